"""Towers that take spectrograms: Whisper, with the keys of its older configs and of its newer ones."""

from triptych.planning.model.configs import Fields
from triptych.planning.model.tower import Tower, linear, mlp


def _whisper(audio: Fields, *, hidden_key: str, width_key: str, layers_key: str, heads_key: str) -> Tower:
    hidden, width, mels = audio.integer(hidden_key), audio.integer(width_key), audio.integer("num_mel_bins")
    layers, heads = audio.integer(layers_key), audio.integer(heads_key)
    each = 4 * linear(hidden, hidden) - hidden + 4 * hidden + mlp(hidden, width)  # keys have no bias
    outside = linear(3 * mels, hidden) + linear(3 * hidden, hidden) + 2 * hidden
    return Tower(
        parameters=outside + audio.integer("max_source_positions") * hidden + layers * each,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        heads=heads,
        head_dim=hidden // heads,
        inputs=2 * mels,  # the second convolution joins two frames
    )


def new_whisper(audio: Fields) -> Tower:
    return _whisper(
        audio,
        hidden_key="hidden_size",
        width_key="intermediate_size",
        layers_key="num_hidden_layers",
        heads_key="num_attention_heads",
    )


def old_whisper(audio: Fields) -> Tower:
    return _whisper(
        audio,
        hidden_key="d_model",
        width_key="encoder_ffn_dim",
        layers_key="encoder_layers",
        heads_key="encoder_attention_heads",
    )
