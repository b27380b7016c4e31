"""Names of domains: ``fog`` is a corruption, ``fog@5`` the same at severity 5 whatever the severity of the others."""

from collections.abc import Iterable

from lightning_tta.data.corruptions.corrupt import CLEAN, SETS, check_name, corruption_names
from lightning_tta.errors import ConfigError

GROUPS = ("reported", "held_out", "none")
_CORRUPTIONS = {name for functions in SETS.values() for name in functions.names}
FALLING = "-falling"  # tells a gradual stream's way down from its way up
BLIND, VISIT, POLLUTION = ":blind_spots", ":visit_", ":pollution"
"""What follows a domain's name where a stream makes several domains of it; of a visit its number comes last."""


def check_domain_names(names: Iterable[str]) -> None:
    """Refuse names of natural domains that name a corruption or a group already."""
    conflicts = sorted({CLEAN, *GROUPS, *_CORRUPTIONS} & set(names))
    if conflicts:
        raise ConfigError(
            f"{', '.join(conflicts)}: a domain of the data cannot have the name of a corruption or of a group of "
            "domains. Rename the domain, or its folder."
        )


def expand_domains(domains: list[str], natural: list[str], function_set: str) -> list[str]:
    """Names of domains, with the groups ``reported``, ``held_out`` and ``none`` written out."""
    reported, held_out = corruption_names(function_set), corruption_names(function_set, held_out=True)
    if isinstance(domains, str) or not domains:
        raise ConfigError(f"domains must be a list of at least one name; got {domains!r}.")
    groups = dict(zip(GROUPS, (reported, held_out, [CLEAN]), strict=True))
    names: list[str] = []
    for name in domains:
        corruption, severity = split_severity(name) if name not in natural else (name, None)
        others = ["reported", "held_out"] if severity is not None else [CLEAN, *groups, *natural]
        check_name(corruption, [*others, *reported, *held_out], "domain")
        level = "" if severity is None else f"@{severity}"
        names += [f"{member}{level}" for member in groups.get(corruption, [corruption])]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"Each domain may occur once; named more than once: {', '.join(repeated)}.")
    return names


def split_severity(name: str) -> tuple[str, int | None]:
    """Corruption and severity of a domain's name: ``("fog", 5)`` of ``fog@5``, ``("fog", None)`` of ``fog``."""
    corruption, at, level = name.removesuffix(FALLING).partition("@")
    if not at:
        return name, None
    if level not in ("1", "2", "3", "4", "5"):
        raise ConfigError(f"Domain {name!r}: write NAME@S with a severity S from 1 to 5, such as {corruption}@5.")
    return corruption, int(level)


def gradual(names: list[str]) -> list[str]:
    """Each corruption at severities 1, 2, 3, 4, 5, 4, 3, 2, 1: its domains, one after the other."""
    unknown = [name for name in names if name not in _CORRUPTIONS]
    if unknown:
        raise ConfigError(
            f"stream='gradual' moves corruptions through all severities; {', '.join(unknown)} cannot be. Name "
            "corruptions without a severity."
        )
    levels = [*(f"@{level}" for level in range(1, 6)), *(f"@{level}{FALLING}" for level in range(4, 0, -1))]
    return [f"{name}{level}" for name in names for level in levels]
