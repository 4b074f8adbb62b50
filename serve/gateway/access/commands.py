"""`palimpsest keys`: make, list and revoke them; a running server takes notice within a second."""

from typing import Annotated

import typer
from rich.console import Console

from serve import preflight
from serve.gateway.access import keys
from serve.gateway.access.keys import Key, Scope
from serve.settings import OFF, Settings

keys_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of the server.")
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

NameArgument = Annotated[str, typer.Argument(help="Whose it is, as it stands in lists: letters, digits, dots, dashes.")]


@keys_app.command()
def add(
    name: NameArgument,
    scope: Annotated[
        list[Scope], typer.Option(help="edit: pictures; operate: load, unload and pin models. May be given twice.")
    ] = [Scope.EDIT],  # noqa: B006  (typer takes it as it is)
    aws: Annotated[
        bool, typer.Option("--aws", help="Also for boto3, which signs: the file then holds the key itself.")
    ] = False,
) -> None:
    """Make a key and print it, this once: the file keeps only what tells it again."""
    settings = _settings()
    file = keys.file_of(settings)
    if any(name == own.name for own in keys.of_environment(settings)):
        raise keys.KeysError(f"PALIMPSEST_KEYS has a key of the name {name} already: take another")
    text, key = keys.add(file, name, scope, keep=aws)
    print(text)
    console.print(f"This is the key of {name} ({', '.join(key.scopes)}). It is not shown again; {file} knows it.")
    if key.access_key_id:
        console.print(f"For boto3: aws_access_key_id={key.access_key_id}, and the key as aws_secret_access_key.")
    if settings.keys.get_secret_value() == OFF:
        console.print(f"PALIMPSEST_KEYS={OFF}: the server asks for no key until that is gone.")


@keys_app.command("list")
def list_keys() -> None:
    """Show the names, what each may do, when it was made, and the id by which AWS clients call it."""
    settings = _settings()
    own, written = keys.of_environment(settings), keys.existing(settings)
    if not own and not written:
        console.print("There are no keys: `palimpsest keys add NAME` makes one.")
    for key in written:
        print(_line(key, key.created))
    for key in own:
        print(_line(key, "PALIMPSEST_KEYS"))


@keys_app.command()
def revoke(name: NameArgument) -> None:
    """End a key; whoever logged in with it is logged out."""
    settings = _settings()
    if any(name == own.name for own in keys.of_environment(settings)):
        raise keys.KeysError(f"{name} stands in PALIMPSEST_KEYS: take it out there, and start the server again")
    keys.revoke(keys.file_of(settings), name)
    console.print(f"{name} is revoked.")


def _line(key: Key, made: str) -> str:
    return f"{key.name:20} {'+'.join(key.scopes):13} {made:25} {key.access_key_id or ''}".rstrip()


def _settings() -> Settings:
    try:
        return preflight.read_settings()
    except preflight.Unusable as error:
        raise keys.KeysError(str(error)) from None
