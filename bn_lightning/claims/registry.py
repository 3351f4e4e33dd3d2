"""Find the claims: each file of ledger/ registers one."""

import importlib
import pkgutil
from collections.abc import Sequence

from bn_lightning.claims.design import Claim

_claims: dict[str, Claim] = {}


def register_claim(claim: Claim) -> None:
    """Add a claim to the ledger.

    Raises:
        ValueError: there is one of this name, or a condition names an arm that the claim lacks.
    """
    if claim.name in _claims:
        raise ValueError(f"expected `name` to be new, got {claim.name!r} twice; rename one")
    for condition in claim.conditions:
        for arm in (condition.arm, condition.against):
            if arm and arm not in claim.arms:
                raise ValueError(
                    f"expected `arm` of {condition.name!r} to be one of {', '.join(claim.arms)}, "
                    f"got {arm!r}; correct it"
                )
    _claims[claim.name] = claim


def find_claims(names: Sequence[str] = ()) -> list[Claim]:
    """Return the claims of these names, or all of them, in alphabetical order.

    Raises:
        ValueError: a name is unknown; the message lists the claims.
    """
    ledger = importlib.import_module("bn_lightning.claims.ledger")
    for module in pkgutil.iter_modules(ledger.__path__):
        importlib.import_module(f"{ledger.__name__}.{module.name}")
    for name in names:
        if name not in _claims:
            raise ValueError(
                f"expected the name of a claim, got {name!r}; choose from "
                f"{', '.join(sorted(_claims))}"
            )
    return [_claims[name] for name in sorted(set(names) or _claims)]
