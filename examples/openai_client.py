"""The OpenAI client on a dplaunch server, as it is.

dplaunch --dp 2                      # in another terminal
python examples/openai_client.py     # --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    """Asks once, streams once, and asks for several answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="what the server was started with (--api-key)")
    args = parser.parse_args()
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        model = client.models.list().data[0].id
        question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=32, temperature=0)
        print(f"{model}: {answer.choices[0].message.content}")
        for part in client.chat.completions.create(model=model, messages=question, max_tokens=32, stream=True):
            print(part.choices[0].delta.content or "", end="", flush=True)
        print()
        several = client.completions.create(model=model, prompt="One, two,", n=2, max_tokens=8, temperature=0.8)
        for choice in several.choices:
            print(f"{choice.index}: {choice.text!r}")


if __name__ == "__main__":
    main()
