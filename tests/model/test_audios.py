import io
import math

import av
import numpy as np
import pytest
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.sounds import FORMATS, encoded, encoded_as, float_wav, noise, wav_header
from triptych.errors import RequestError
from triptych.model.audios import MAX_CHANNELS, MAX_RATE, MAX_SECONDS, MIN_RATE, decode_audio, read_audio_header
from triptych.model.headers import AudioHeader

TWICE = (read_audio_header, decode_audio)  # both ends refuse alike


def refusal(data: bytes, read: object = read_audio_header) -> str:
    with pytest.raises(RequestError) as caught:
        read(data, 16_000)  # type: ignore[operator]
    assert caught.value.status == 400
    assert caught.value.code == "invalid_audio"
    return str(caught.value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)))
def test_header_and_decoder_agree_on_the_number_of_samples(data: st.DataObject, name: str) -> None:
    rate = data.draw(st.sampled_from(FORMATS[name].rates))
    exact = FORMATS[name].codec.startswith(("pcm", "flac", "alac"))
    num_samples = data.draw(st.integers(1 if exact else 2_100, 20_000))  # lossy ones need a frame or two
    wanted = data.draw(st.sampled_from([8_000, 16_000, 24_000, 48_000]))
    layout = data.draw(st.sampled_from(["mono", "stereo"]))
    file = encoded(name, noise(num_samples), rate, layout=layout)
    header = read_audio_header(file, wanted)
    samples = decode_audio(file, wanted)
    assert header == AudioHeader(len(samples), wanted)
    assert samples.dtype == np.float32
    if exact:
        assert len(samples) == math.ceil(num_samples * wanted / rate)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)))
def test_damaged_files_are_refused_or_have_the_announced_number_of_samples(data: st.DataObject, name: str) -> None:
    file = bytearray(encoded(name, noise(30_000), FORMATS[name].rates[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_audio_header(bytes(file), 16_000)
        samples = decode_audio(bytes(file), 16_000)
    except RequestError:
        return
    assert len(samples) == header.num_samples > 0


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_decoded_file_sounds_like_what_was_encoded(name: str) -> None:
    rate = FORMATS[name].rates[-1]
    hum = (0.4 * np.sin(np.arange(rate) * 2 * np.pi * 300 / rate)).astype(np.float32)
    samples = decode_audio(encoded(name, hum, rate), rate)
    middle = slice(rate // 4, rate // 2)
    shifts = [np.abs(samples[rate // 4 + shift : rate // 2 + shift] - hum[middle]).mean() for shift in range(2200)]
    assert min(shifts) < 0.03  # some codecs begin with silence of their own


def test_samples_keep_their_values() -> None:
    samples = noise(5_000)
    np.testing.assert_array_equal(decode_audio(float_wav(samples), 16_000), samples)
    steps = np.arange(-32_768, 32_768, 257, dtype="<i2")
    wav = wav_header(steps.nbytes, 16_000) + steps.tobytes()
    np.testing.assert_array_equal(decode_audio(wav, 16_000), steps.astype(np.float32) / 32_768)


def test_channels_become_their_mean() -> None:
    left, right = noise(3_000, seed=1), noise(3_000, seed=2)
    pairs = np.stack([left, right], axis=1).astype("<f4")
    wav = wav_header(pairs.nbytes, 16_000, kind=3, bits=32, channels=2) + pairs.tobytes()
    np.testing.assert_allclose(decode_audio(wav, 16_000), (left + right) / 2, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(1, 9_000), rate=st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000, 96_000]))
def test_resampling_gives_what_transformers_own_loader_gives(num_samples: int, rate: int) -> None:
    """soxr in high quality, filled up with silence to the length in seconds, rounded up."""
    samples = noise(num_samples)
    expected = soxr.resample(samples, rate, 16_000, quality="soxr_hq")
    length = math.ceil(num_samples * 16_000 / rate)
    expected = np.pad(expected, (0, max(0, length - len(expected))))[:length]
    np.testing.assert_array_equal(decode_audio(float_wav(samples, rate), 16_000), expected)


@pytest.mark.parametrize("read", TWICE)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"hello", id="text"),
        pytest.param(b"\xff\xd8\xff\xe0" + bytes(500), id="a picture"),
        pytest.param(np.random.default_rng(0).bytes(4_000), id="noise"),
        pytest.param(b"RIFF\0\0\0\0WAVE", id="a WAV file that ends in its header"),
        pytest.param(b"ID3" + bytes(3_000), id="tags alone"),
    ],
)
def test_bytes_that_are_no_audio_are_refused(data: bytes, read: object) -> None:
    assert "cannot be decoded" in refusal(data, read)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_files_that_name_other_files_are_refused(playlist: str, tmp_path: object) -> None:
    other = f"{tmp_path}/other.wav"
    with open(other, "wb") as file:
        file.write(float_wav(noise(1_000)))
    refusal(playlist.format(path=other).encode())


@pytest.mark.parametrize("read", TWICE)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_file_that_was_cut_off_is_refused(name: str, read: object) -> None:
    whole = encoded(name, noise(150_000), FORMATS[name].rates[-1])
    for share in (0.02, 0.4, 0.8, 0.97):
        refusal(whole[: int(len(whole) * share)], read)


def test_the_refusal_of_a_file_that_was_cut_off_says_so() -> None:
    for name in ("wav", "mp3", "flac", "opus", "webm"):
        whole = encoded(name, noise(150_000), FORMATS[name].rates[-1])
        assert "cut off" in refusal(whole[: int(len(whole) * 0.6)])


@pytest.mark.parametrize("read", TWICE)
def test_a_file_without_samples_is_refused(read: object) -> None:
    assert "no samples" in refusal(wav_header(0, 16_000), read)


@pytest.mark.parametrize("read", TWICE)
@pytest.mark.parametrize("rate", [0, 1, MIN_RATE - 1, MAX_RATE + 1, 2**31 - 1])
def test_a_rate_that_cannot_be_is_refused(rate: int, read: object) -> None:
    refusal(wav_header(2_000, rate) + bytes(2_000), read)


@pytest.mark.parametrize("rate", [MIN_RATE, MAX_RATE])
def test_the_rates_at_the_bounds_are_served(rate: int) -> None:
    wav = float_wav(noise(2_000), rate)
    assert len(decode_audio(wav, 16_000)) == read_audio_header(wav, 16_000).num_samples == -(-2_000 * 16_000 // rate)


def test_too_many_channels_are_refused() -> None:
    channels = MAX_CHANNELS + 1
    assert "channels" in refusal(wav_header(channels * 200, 16_000, channels=channels) + bytes(channels * 200))


@pytest.mark.parametrize("read", TWICE)
def test_a_codec_that_is_not_served_is_refused_by_name(read: object) -> None:
    assert "adpcm_ima_wav" in refusal(encoded_as("wav", "adpcm_ima_wav", noise(9_000), 16_000), read)
    assert "not supported" in refusal(wav_header(2_000, 16_000, kind=0x1234) + bytes(2_000), read)
    assert "ac3" in refusal(encoded_as("matroska", "ac3", noise(9_000), 48_000), read)


@pytest.mark.parametrize("read", TWICE)
def test_a_video_without_sound_is_refused(read: object) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        file.mux(stream.encode(None))
    assert "no audio track" in refusal(out.getvalue(), read)


@pytest.mark.parametrize("read", TWICE)
def test_a_file_beyond_the_limit_is_refused(read: object) -> None:
    """Also one that is tiny: silence compresses to almost nothing."""
    num_samples = MAX_SECONDS * MIN_RATE + 1
    wav = wav_header(num_samples, MIN_RATE, bits=8) + b"\x80" * num_samples
    assert "longer than" in refusal(wav, read)
    flac = encoded_as("flac", "flac", np.zeros(MAX_SECONDS * 8_000 + 8_000, np.float32), 8_000)
    assert len(flac) < 500_000
    assert "longer than" in refusal(flac, read)


def test_samples_that_are_no_numbers_are_refused() -> None:
    for value in (np.nan, np.inf):
        samples = noise(2_000)
        samples[777] = value
        assert "finite" in refusal(float_wav(samples), decode_audio)


def test_recordings_whose_length_was_never_written_are_served() -> None:
    """What programs write that record into a pipe, and browsers."""
    data = (noise(4_000) * 32_767).astype("<i2").tobytes()
    for announced in (0xFFFFFFFF, 0x7FFFFFFF):
        assert read_audio_header(wav_header(announced, 16_000) + data, 16_000).num_samples == 4_000
    live = encoded_as("webm", "libopus", noise(96_000), 48_000, options={"live": "1"})
    assert abs(len(decode_audio(live, 16_000)) - 32_000) < 700


@pytest.mark.parametrize("name", ["mp3", "wav", "flac", "aac"])
def test_tags_around_the_sound_change_nothing(name: str) -> None:
    file = encoded(name, noise(50_000), 44_100)
    text = b"Title, Info and Xing".ljust(500)
    front = b"ID3\x04\0\0" + bytes([0, 0, len(text) >> 7, len(text) & 127]) + text
    tagged = front + file if name in ("mp3", "flac", "aac") else file
    if name == "mp3":
        tagged += b"TAG".ljust(128, b" ")
    if name == "wav":
        tagged += b"LIST\x08\0\0\0INFOabcd"
    np.testing.assert_array_equal(decode_audio(tagged, 16_000), decode_audio(file, 16_000))
    assert read_audio_header(tagged, 16_000) == read_audio_header(file, 16_000)


def test_an_mp3_file_that_does_not_say_how_long_it_is_is_served() -> None:
    """With a bit rate that changes, FFmpeg's guess from the first frames can be far off."""
    quiet, loud = np.zeros(44_100 * 3, np.float32), noise(44_100 * 3)
    for samples in (np.concatenate([quiet, loud]), np.concatenate([loud, quiet])):
        file = encoded_as(
            "mp3",
            "libmp3lame",
            samples,
            44_100,
            options={"write_xing": "0", "id3v2_version": "0"},
            codec_options={"flags": "+qscale", "global_quality": "118"},
        )
        assert b"Xing" not in file and b"Info" not in file
        assert abs(read_audio_header(file, 16_000).num_samples - 96_000) < 2_000


@pytest.mark.parametrize("read", TWICE)
def test_a_file_whose_rate_changes_on_the_way_is_refused(read: object) -> None:
    parts = [encoded("mp3", noise(20_000), rate) for rate in (44_100, 48_000)]
    assert "change" in refusal(b"".join(part[part.index(b"\xff\xfb") :] for part in parts), read)


def test_the_sound_of_a_video_file_can_be_taken() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        video, audio = file.add_stream("mpeg4", rate=5), file.add_stream("aac", rate=16_000, layout="mono")
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        for index in range(10):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            frame = av.AudioFrame.from_ndarray(noise(1_024)[None], "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, index * 1_024
            file.mux(audio.encode(frame))
        file.mux([*video.encode(None), *audio.encode(None)])
    samples = decode_audio(out.getvalue(), 16_000)
    assert len(samples) == read_audio_header(out.getvalue(), 16_000).num_samples
    assert abs(len(samples) - 10_240) <= 1_024
