"""Asks a server about pictures: .venv/bin/python examples/ask.py "What colour is the circle?" picture.png"""

import argparse
import base64
import mimetypes
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from openai import OpenAI, OpenAIError


def main() -> None:
    options = parsed()
    client = OpenAI(base_url=f"{server_url(options.url)}/v1", api_key=options.api_key)
    try:
        content = [*map(image_part, options.pictures), {"type": "text", "text": options.question}]
        stream = client.chat.completions.create(
            model=options.model or client.models.list().data[0].id,
            messages=[{"role": "user", "content": content}],
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    except (OpenAIError, httpx.HTTPError) as error:
        sys.exit(f"{options.url}: {error}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("pictures", nargs="*", metavar="picture", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (%(default)s)")
    parser.add_argument("--model", help="what the server calls it; the first that it lists if left out")
    parser.add_argument("--api-key", default="none", help="where the server wants one")
    return parser.parse_args()


def server_url(text: str) -> str:
    """Without /v1, and with http:// where it has no scheme."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        found = urlsplit(url)
        is_valid = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:  # a port that is no number
        is_valid = False
    if not is_valid or found.query or found.fragment:
        sys.exit(f"--url: {text!r} is not the address of a server, such as http://127.0.0.1:8000")
    return url


def image_part(path: Path) -> dict[str, object]:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


main()
