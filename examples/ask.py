"""Asks a question about pictures: python examples/ask.py "What colour is the circle in picture 1?" picture.png"""

import base64
import sys
from pathlib import Path

from openai import OpenAI


def image_part(path: str) -> dict[str, object]:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    question, *paths = sys.argv[1:]
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    content = [*map(image_part, paths), {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model="triptych-demo", messages=[{"role": "user", "content": content}], stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


main()
