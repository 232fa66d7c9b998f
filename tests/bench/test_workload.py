import base64
import io
from typing import Any

import msgspec
from PIL import Image

from triptych.bench.options import BenchOptions, Kind
from triptych.bench.workload import Workload


def parsed(options: BenchOptions, index: int) -> dict[str, Any]:
    return dict(
        msgspec.json.decode(Workload(options, "m", {kind.name: kind.text_words for kind in options.mix}).body(index))
    )


def pictures(body: dict[str, Any]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_equal_options_give_equal_bodies_and_another_seed_gives_others() -> None:
    options = BenchOptions(images=1, image_sizes=("32x32",))
    assert parsed(options, 3) == parsed(options, 3)
    assert parsed(options, 3) != parsed(msgspec.structs.replace(options, seed=1), 3)


def test_no_two_requests_share_a_text_or_a_picture() -> None:
    options = BenchOptions(images=3, image_sizes=("32x32",))
    contents = [part for i in range(20) for part in parsed(options, i)["messages"][0]["content"]]
    encoded = [msgspec.json.encode(part) for part in contents]
    assert len(set(encoded)) == len(encoded)


def test_pictures_take_the_sizes_in_turn() -> None:
    options = BenchOptions(images=2, image_sizes=("32x16", "40x50", "8x9"), image_format="png")
    sizes = [picture.size for index in range(3) for picture in pictures(parsed(options, index))]
    assert sizes == [(32, 16), (40, 50), (8, 9)] * 2


def test_only_standard_fields_unless_asked_for_more() -> None:
    standard = {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert set(parsed(BenchOptions(), 0)) == standard
    assert parsed(BenchOptions(ignore_eos=True), 0)["ignore_eos"] is True


def test_a_mix_has_equally_many_of_each_kind_in_an_order_that_hangs_on_the_seed() -> None:
    kinds = (Kind(name="text", text_words=3, output_tokens=9), Kind(name="pictures", images=2, output_tokens=5))
    options = BenchOptions(requests=40, image_sizes=("32x32",), kinds=kinds)
    orders = []
    for seed in (0, 0, 1):
        workload = Workload(msgspec.structs.replace(options, seed=seed), "m", {"text": 3, "pictures": 4})
        orders.append([workload.kind(index).name for index in range(40)])
        for index in range(40):
            body = msgspec.json.decode(workload.body(index))
            assert (len(pictures(body)) if workload.kind(index).images else 0) == workload.kind(index).images
            assert body["max_tokens"] == workload.kind(index).output_tokens
    assert orders[0] == orders[1] != orders[2]
    assert orders[0].count("text") == orders[2].count("text") == 20
