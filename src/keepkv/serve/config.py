"""The configuration of a server: one typed record, from a YAML file and from flags of the same names.

YAML, because every place that runs transformers can read it, on every Python that keepkv supports; TOML needs 3.11.
What needs torch is imported where it is used: the command line shows its flags without.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo

from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.serve.settings import Settings


def _bytes(value: Any, info: ValidationInfo) -> int:
    from keepkv.plan.units import read_bytes

    return _read(read_bytes, value, info)


def _tokens(value: Any, info: ValidationInfo) -> int:
    from keepkv.plan.units import read_tokens

    return _read(read_tokens, value, info)


def _read(read: Callable[[Any, str], int], value: Any, info: ValidationInfo) -> int:
    try:
        return read(value, str(info.field_name))
    except KeepKVError as error:
        raise ValueError(str(error)) from None


def _budget(value: Any) -> Any:
    from keepkv.core.budget import Budget

    return Budget.of(value).value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]  # a number, or "4GiB"
Tokens = Annotated[int, BeforeValidator(_tokens), Field(gt=0)]  # a number, or "128k"


class Config(BaseModel):
    """What a server is told. Sizes may be texts such as "4GiB" and "128k"."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What is served, and where.
    model: str | None = Field(default=None, description="Directory or Hub name; the embedded model if absent.")
    name: str | None = Field(default=None, min_length=1, description="What requests call the model; MODEL if absent.")
    device: str = Field(default="auto", description="cpu, cuda, or as torch calls it.")
    dtype: str = Field(default="auto", description="Of the weights: float32, bfloat16, float16; as saved if absent.")
    chat_template: Path | None = Field(
        default=None, description="File with a chat template, for a model that has none."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on: this machine only, if absent.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: one that is free.")
    api_key: SecretStr | None = Field(default=None, description="Key that clients must give.")
    # What requests are compressed with where they do not say.
    method: str | None = Field(default=None, description="NAME or NAME:key=value, of requests that name none.")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the method.")
    budget: Annotated[int | float | str, BeforeValidator(_budget)] | None = Field(
        default=None, description="Share of the tokens (0.25) or slots per head (512); on request only if absent."
    )
    codec: str | None = Field(default=None, description="How slots are written: int8, int4 …")
    every: int | None = Field(default=None, ge=1, description="Compress again after so many tokens of the reply.")
    # Upper limits of a request.
    methods: tuple[str, ...] | None = Field(default=None, description="Method that may be asked for; all if absent.")
    max_budget: Annotated[int | float, BeforeValidator(_budget)] = Field(
        default=1.0, description="The most that a request may keep: a share, or slots per head."
    )
    max_prompt: Tokens | None = Field(default=None, description="Tokens of a prompt; as the model reads if absent.")
    max_reply: Tokens | None = Field(default=None, description="Tokens of a reply; as the model reads if absent.")
    max_choices: int = Field(default=8, ge=1, le=128, description="Replies to one request.")
    max_body: Bytes = Field(default=32 << 20, description="Bytes of a request, such as 32MiB.")
    # What the engine takes.
    rows: int = Field(default=16, ge=1, description="Requests that decode at once.")
    queue: int = Field(default=64, ge=0, description="Requests that may wait.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Of a CPU, that decode; if absent, what is fastest is tried at the start.",
    )
    chunk: Tokens = Field(default=512, description="Tokens of a prompt that are read at once.")
    memory: Bytes | None = Field(
        default=None, description="Of all caches, such as 4GiB; half of what is free if absent."
    )
    contexts: Path | None = Field(default=None, description="Folder of contexts, which are lost at the end if absent.")
    context_memory: Bytes | None = Field(default=None, description="Of contexts in memory, such as 1GiB.")
    context_disk: Bytes | None = Field(default=None, description="Of contexts on disk.")
    grace: float = Field(default=30.0, ge=0, description="Seconds that running requests get when the server stops.")

    @property
    def served(self) -> str:
        """The name that requests call the model by."""
        return self.name or self.model or "keepkv-embedded"

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def settings(self) -> Settings:
        """What the engine is told. Raises ``KeepKVError`` where it refuses that."""
        from keepkv.serve.request import Compression
        from keepkv.serve.settings import Settings

        compression = Compression(self.method, self.options, self.budget, self.codec, None, self.every)
        return Settings(
            compression=compression, methods=self.methods, budget=self.max_budget, rows=self.rows, queue=self.queue,
            prompt=self.max_prompt, reply=self.max_reply, chunk=self.chunk, threads=self.threads, memory=self.memory,
            contexts=self.contexts, context_bytes=self.context_memory, context_disk=self.context_disk,
        )  # fmt: skip


def read_config(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration in a YAML file, or the default one; ``flags`` that are not None go before it.

    Raises ``KeepKVError`` where the file cannot be read, and where a field is unknown or does not fit.
    """
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise KeepKVError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise KeepKVError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise KeepKVError(f"{str(path)!r}: expected fields and their values, such as 'port: 8001'")
    where = "flags" if path is None else f"{str(path)!r} and flags"
    try:
        return Config.model_validate({**given, **{k: v for k, v in (flags or {}).items() if v is not None}})
    except ValidationError as error:
        raise KeepKVError(f"{where}: {said(error)}") from None


def said(error: ValidationError) -> str:
    """What does not fit, in one line; a field that is unknown is told with all that are known."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}. Known: {', '.join(Config.model_fields)}"
    return f"{field}: {first['msg'].removeprefix('Value error, ')}"
