"""Prefill: prompts to KV and a first token, in chunks, over whatever part of the embeddings has arrived.

`stage` is its face. Behind it, in the order in which a request meets them: `jobs` are the requests that are here,
`intake` brings their embeddings, `prompt_blocks` gives them KV blocks, `chunks` says what of them runs next, and
`hand_over` passes their KV on to whoever decodes.
"""

from triptych.stages.prefill.stage import PrefillStage

__all__ = ["PrefillStage"]
