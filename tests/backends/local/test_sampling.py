"""A question on its way to a model."""

import pytest
from pydantic import SecretStr

from training_backends.backends.local.process import Hub, ask_model
from training_backends.core.backend import CredentialSource
from training_backends.core.run import Reply

pytestmark = pytest.mark.anyio


class Vault(CredentialSource):
    """Has one token."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Give it to everybody."""
        del profile
        return SecretStr(f"{provider}-token")


async def test_neither_the_question_nor_the_token_is_an_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both go the same way, one behind the other, whatever the text is."""
    seen: list[tuple[list[str], bytes]] = []

    async def communicate(
        command: list[str], given: bytes, variables: dict[str, str]
    ) -> tuple[int, bytes, bytes]:
        seen.append((command, given))
        return 0, b'{"answer": "yes"}', b""

    monkeypatch.setattr("training_backends.backends.local.process.communicate", communicate)
    child_env = await Hub(credentials=Vault()).child_environment("org/model")
    reply = await ask_model("org/model", "why?\n\0 \udcff", child_env=child_env)
    assert reply == Reply(answer="yes")
    ((command, given),) = seen
    assert "why?" not in " ".join(command)
    assert given == b"huggingface-token\nwhy?\n\0 ?"
    await ask_model("org/model", [{"role": "user", "content": "a \udcff"}], child_env=child_env)
    command, given = seen[1]
    assert command[-1] == "--messages"
    assert given == b'huggingface-token\n[{"role": "user", "content": "a ?"}]'
