"""The claims of `sdk_table.py`, of OpenAI's SDK."""

from __future__ import annotations

import openai
from sdk_table import SDKTests, Vendor

from tokenscope.integrations.openai import cancellable


class TestOpenAI(SDKTests):
    """Chat completions."""

    vendor = Vendor(
        sdk=openai,
        client=openai.OpenAI,
        awaiting=openai.AsyncOpenAI,
        cancellable=cancellable,
        prefix="/v1",
        calls=lambda client: client.chat.completions,
        text=lambda answer: answer.choices[0].message.content,
        word=lambda chunk: chunk.choices[0].delta.content,
    )
