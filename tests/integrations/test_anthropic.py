"""The claims of `sdk_table.py`, of Anthropic's SDK."""

from __future__ import annotations

import anthropic
from sdk_table import SDKTests, Vendor

from tokenscope.integrations.anthropic import cancellable


class TestAnthropic(SDKTests):
    """Messages."""

    vendor = Vendor(
        sdk=anthropic,
        client=anthropic.Anthropic,
        awaiting=anthropic.AsyncAnthropic,
        cancellable=cancellable,
        prefix="",
        calls=lambda client: client.messages,
        text=lambda answer: answer.content[0].text,
        word=lambda event: event.delta.text if event.type == "content_block_delta" else "",
    )
