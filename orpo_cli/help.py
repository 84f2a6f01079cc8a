"""`orpo --help`: the verbs under headings, in the order in which one comes to need them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class GroupedVerbs(TyperGroup):
    """A command whose help lists its verbs by their `rich_help_panel`, each with all of its first sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of the program, not of the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the groups in the order in which their first verbs come."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            verb: Any = self.commands[name]
            groups.setdefault(verb.rich_help_panel or "Verbs", []).append((name, _first_sentence(verb.help)))
        widest = max(len(name) for verbs in groups.values() for name, _ in verbs)
        for heading, verbs in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(widest), text) for name, text in verbs])


def _first_sentence(text: str | None) -> str:
    """Its first paragraph, as one line, without the full stop."""
    return " ".join((text or "").split("\n\n")[0].split()).removesuffix(".")
