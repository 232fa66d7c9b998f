"""Families that hear: Qwen2-Audio, Voxtral, Audio Flamingo 3, and Qwen2.5-Omni, which sees too."""

from dataclasses import replace
from typing import Any

from triptych.planning.model.configs import Fields
from triptych.planning.model.families.reading import NAMELESS, images_of, pixel_bounds, read_language, square_of
from triptych.planning.model.language import Language
from triptych.planning.model.pictures import MergedPatches
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.sounds import Windows
from triptych.planning.model.tower import Tower, linear
from triptych.planning.model.towers import read_tower
from triptych.planning.model.units import Sounds
from triptych.planning.model.videos import TemporalSlices

CHUNKS_OF_A_UNIT = 5  # Qwen2.5-Omni: chunks of sound that are encoded as one unit, as the engine does

# The text model where the config says nothing of it.
VOXTRAL = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "head_dim": 128}
VOXTRAL |= {"vocab_size": 131072, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def _extractor(processor: Fields) -> Fields:
    given = processor.part("feature_extractor").given or processor.given
    usual = {"sampling_rate": 16000, "hop_length": 160, "chunk_length": 30}
    return Fields(given, usual, name=processor.name)


def _frames_of_window(arguments: Fields) -> int:
    samples = arguments.integer("n_samples", arguments.integer("chunk_length") * arguments.integer("sampling_rate"))
    return arguments.integer("nb_max_frames", samples // arguments.integer("hop_length"))


def _windows(processor: Fields, **more: Any) -> Windows:
    arguments = _extractor(processor)
    window = more.pop("window", _frames_of_window(arguments))
    return Windows(arguments.integer("sampling_rate"), arguments.integer("hop_length"), window, **more)


def _sound_shape(tower: Tower, language: Language, projector: int, sounds: Sounds, *, marks_of_item: int) -> ModelShape:
    return ModelShape(
        name=NAMELESS,
        language=language,
        sound=replace(tower, projector=projector),
        sounds=sounds,
        marks_of_item=marks_of_item,
    )


def qwen2_audio(config: Fields, processor: Fields) -> ModelShape:
    tower, _ = read_tower(config, "audio_config", "qwen2_audio_encoder")
    language = read_language(config, "qwen2")
    sounds = _windows(processor, max_windows=1, padded=False, pads_positions=True)
    return _sound_shape(tower, language, linear(tower.hidden, language.hidden), sounds, marks_of_item=2)


def voxtral(config: Fields, processor: Fields) -> ModelShape:
    tower, audio = read_tower(config, "audio_config", "voxtral_encoder")
    language = read_language(config, "llama", absent=VOXTRAL)
    rows = audio.integer("max_source_positions") * tower.hidden // tower.intermediate
    projector = tower.intermediate * language.hidden + language.hidden**2
    sounds = _windows(processor, max_windows=1 << 30, padded=True, pads_positions=True, rows_per_window=rows)
    return _sound_shape(tower, language, projector, sounds, marks_of_item=1)


def audioflamingo3(config: Fields, processor: Fields) -> ModelShape:
    tower, _ = read_tower(config, "audio_config", "audioflamingo3_encoder")
    language = read_language(config, "qwen2")
    bias = config.flag("projector_bias") or not config.is_given("projector_bias")
    projector = linear(tower.hidden, language.hidden, bias) + linear(language.hidden, language.hidden, bias)
    most = int(processor.number("max_audio_len", 600) // _extractor(processor).integer("chunk_length"))
    sounds = _windows(processor, max_windows=most, padded=False, pads_positions=True)
    return _sound_shape(tower, language, projector, sounds, marks_of_item=0)


def qwen2_5_omni(config: Fields, processor: Fields) -> ModelShape:
    """Its thinker, which takes prompts and answers in text."""
    tower, audio = read_tower(config, "audio_config", "qwen2_5_omni_audio_encoder")
    eyes, vision = read_tower(config, "vision_config", "qwen2_5_omni_vision_encoder")
    out = audio.integer("output_dim")
    positions = audio.integer("max_source_positions") * tower.hidden  # a table that is no parameter here
    ears = replace(
        tower,
        parameters=tower.parameters - positions,
        projector=linear(tower.hidden, out) + 2 * out,
    )
    side, merged = square_of(vision)
    window = 2 * audio.integer("n_window") * CHUNKS_OF_A_UNIT
    most = _frames_of_window(_extractor(processor))
    return ModelShape(
        name=NAMELESS,
        language=read_language(config, "qwen2_5_omni_text"),
        vision=eyes,
        sound=ears,
        pictures=MergedPatches(side, merged, *pixel_bounds(images_of(processor), 56 * 56, 28 * 28 * 1280)),
        videos=TemporalSlices(
            side, merged, vision.integer("temporal_patch_size"), 128 * 784, 768 * 784, by_volume=False
        ),
        sounds=_windows(
            processor, window=window, max_frames=most, max_windows=1 << 30, padded=False, pads_positions=False
        ),
    )
