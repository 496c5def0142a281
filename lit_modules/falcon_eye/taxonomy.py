"""Kinds of harm as others name them, in the thirteen names of `HARM_CATEGORIES`.

The maps are ours: taxonomies cut the field in different places, so one kind of another may be several here, and a
figure by category compares judges of different taxonomies only roughly. GuardReasoner-VL names no kinds at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from leanlight.contracts import HARM_CATEGORIES, UserError, nearest

Taxonomy = Mapping[str, tuple[str, ...]]

#: Codes of Llama Guard 3 Vision (S1 to S13) and of Llama Guard 4, which adds S14, by their published titles.
LLAMA_GUARD: Taxonomy = MappingProxyType(
    {
        "S1": ("Violence and Physical Harm",),  # violent crimes
        "S2": ("Illegal Activity", "Fraud", "Malware"),  # non-violent crimes
        "S3": ("Adult Content", "Abuse"),  # sex-related crimes
        "S4": ("Adult Content", "Abuse"),  # child sexual exploitation
        "S5": ("Unethical Behavior",),  # defamation
        "S6": ("Unlicensed Advice",),  # specialized advice
        "S7": ("Privacy Violation",),  # privacy
        "S8": ("Illegal Activity",),  # intellectual property
        "S9": ("Violence and Physical Harm",),  # indiscriminate weapons
        "S10": ("Hate Speech", "Bias"),  # hate
        "S11": ("Violence and Physical Harm",),  # suicide and self-harm
        "S12": ("Adult Content",),  # sexual content
        "S13": ("Politics",),  # elections
        "S14": ("Malware",),  # code interpreter abuse
    }
)
#: Codes of LlavaGuard's policy (Helff et al. 2024); ``NA`` stands for none.
LLAVA_GUARD: Taxonomy = MappingProxyType(
    {
        "O1": ("Hate Speech", "Abuse"),  # hate, humiliation, harassment
        "O2": ("Violence and Physical Harm",),  # violence, harm, or cruelty
        "O3": ("Adult Content",),  # sexual content
        "O4": ("Adult Content",),  # nudity
        "O5": ("Illegal Activity",),  # criminal planning
        "O6": ("Illegal Activity",),  # weapons or substance abuse
        "O7": ("Violence and Physical Harm",),  # self-harm
        "O8": ("Abuse",),  # animal cruelty
        "O9": ("Violence and Physical Harm",),  # disasters or emergencies
        "NA": (),
    }
)
#: The configurations of BeaverTails-V (Ji et al. 2025).
BEAVERTAILS_V: Taxonomy = MappingProxyType(
    {
        "animal_abuse": ("Abuse",),
        "dangerous_behavior": ("Violence and Physical Harm",),
        "deception_in_personal_relationships": ("Unethical Behavior",),
        "discriminatory_depictions": ("Bias", "Hate Speech"),
        "environmental_damage": ("Illegal Activity",),
        "false_information": ("Unethical Behavior",),
        "financial_and_academic_fraud": ("Fraud",),
        "hacking_or_digital_crime": ("Malware",),
        "harmful_health_content": ("Unlicensed Advice",),
        "horror_and_gore": ("Violence and Physical Harm",),
        "identity_misuse_and_impersonation": ("Fraud", "Privacy Violation"),
        "insulting_and_harassing_behavior": ("Abuse",),
        "pornographic_content": ("Adult Content",),
        "privacy_invasion_and_surveillance": ("Privacy Violation",),
        "psychological_harm_and_manipulation": ("Abuse",),
        "psychological_horror_and_dark_themes": ("Violence and Physical Harm",),
        "sensitive_information_in_key_areas": ("Politics",),
        "sexual_crimes": ("Adult Content", "Abuse"),
        "terrorism_or_extremism": ("Violence and Physical Harm",),
        "violence_and_physical_harm": ("Violence and Physical Harm",),
    }
)
#: The sub-categories of VLGuard (Zong et al. 2024).
VLGUARD: Taxonomy = MappingProxyType(
    {
        "personal data": ("Privacy Violation",),
        "professional advice": ("Unlicensed Advice",),
        "political": ("Politics",),
        "sexually explicit": ("Adult Content",),
        "violence": ("Violence and Physical Harm",),
        "disinformation": ("Unethical Behavior",),
        "sex": ("Bias", "Hate Speech"),  # discrimination by sex
        "race": ("Bias", "Hate Speech"),  # discrimination by race
        "other discrimination": ("Bias", "Hate Speech"),
    }
)


def category(name: str) -> str:
    """The name of `HARM_CATEGORIES` that `name` is, whatever its case and spaces; UserError with the nearest one."""
    wanted = " ".join(name.split()).casefold()
    for known in HARM_CATEGORIES:
        if known.casefold() == wanted:
            return known
    close = nearest(wanted.title(), HARM_CATEGORIES)
    raise UserError(f"category: expected one of {', '.join(HARM_CATEGORIES)}, got {name!r}{close}")


def translated(names: Iterable[str], taxonomy: Taxonomy) -> tuple[str, ...]:
    """Names of another taxonomy as names of `HARM_CATEGORIES`, in their order, each once; unknown ones are left out."""
    found = {kind for name in names for kind in taxonomy.get(name, ())}
    return tuple(kind for kind in HARM_CATEGORIES if kind in found)


def mentioned(text: str) -> tuple[str, ...]:
    """Names of `HARM_CATEGORIES` that occur anywhere in a text, which is how the authors of FalconEye give credit.

    No name holds another one. Even "no Fraud" mentions Fraud.
    """
    return tuple(kind for kind in HARM_CATEGORIES if kind in text)
