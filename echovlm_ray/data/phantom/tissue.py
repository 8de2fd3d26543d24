"""Tissues: how bright they are, and how much they attenuate.

Attenuation in dB/cm/MHz: PMC10001275 (blood 0.15, liver 0.50, heart 0.52, fat 0.63, breast 0.75, kidney 1.0, muscle
0.96 to 1.4, bone 15); PMID 3152399 and 10574336 (steatosis 0.81 with 11 dB more backscatter, cirrhosis 0.63, hepatic
tumour 0.38); PMID 14606563 (thyroid 1.5, Hashimoto 1.1). Echogenicity in dB relative to normal liver: chosen so that
the order of brightness is the usual one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tissue:
    """One material.

    Attributes:
        label: its number in label maps, see `LABELS`.
        echo: echogenicity, dB relative to normal liver.
        attenuation: dB/cm/MHz.
    """

    label: int
    echo: float
    attenuation: float


# Names of the numbers in label maps. The numbers must not change: trained heads refer to them.
LABELS = (
    "outside",
    "fat",
    "gland",
    "muscle",
    "interface",
    "fluid",
    "liver",
    "kidney",
    "sinus",
    "heart",
    "thyroid",
    "uterus",
    "ovary",
    "vessel_wall",
    "bone_or_gas",
    "lesion_fluid",
    "lesion_solid",
    "lesion_bright",
)
_NUMBER = {name: number for number, name in enumerate(LABELS)}
LESION_LABELS = frozenset(_NUMBER[name] for name in LABELS if name.startswith("lesion"))

FAT = Tissue(_NUMBER["fat"], -11.0, 0.63)
SUBCUTANEOUS = Tissue(_NUMBER["fat"], -8.0, 0.63)
GLAND = Tissue(_NUMBER["gland"], 3.0, 0.75)
MUSCLE = Tissue(_NUMBER["muscle"], -9.0, 1.0)
FASCIA = Tissue(_NUMBER["interface"], 11.0, 1.0)
CONNECTIVE = Tissue(_NUMBER["gland"], 1.0, 0.75)
FLUID = Tissue(_NUMBER["fluid"], -55.0, 0.05)
BLOOD = Tissue(_NUMBER["fluid"], -50.0, 0.15)
LIVER = Tissue(_NUMBER["liver"], 0.0, 0.50)
LIVER_FATTY = Tissue(_NUMBER["liver"], 11.0, 0.81)
LIVER_CIRRHOTIC = Tissue(_NUMBER["liver"], 0.0, 0.63)
KIDNEY = Tissue(_NUMBER["kidney"], -6.0, 1.0)
PYRAMID = Tissue(_NUMBER["kidney"], -14.0, 1.0)
SINUS = Tissue(_NUMBER["sinus"], 8.0, 0.63)
HEART = Tissue(_NUMBER["heart"], -3.0, 0.52)
PERICARDIUM = Tissue(_NUMBER["interface"], 14.0, 0.52)
THYROID = Tissue(_NUMBER["thyroid"], 4.0, 1.5)
THYROID_DIFFUSE = Tissue(_NUMBER["thyroid"], -12.0, 1.1)
UTERUS = Tissue(_NUMBER["uterus"], -4.0, 0.70)
ENDOMETRIUM = Tissue(_NUMBER["interface"], 8.0, 0.70)
OVARY = Tissue(_NUMBER["ovary"], -9.0, 0.70)
VESSEL_WALL = Tissue(_NUMBER["vessel_wall"], 10.0, 0.7)
BONE = Tissue(_NUMBER["bone_or_gas"], 20.0, 15.0)
GAS = Tissue(_NUMBER["bone_or_gas"], 18.0, 8.0)

CYST = Tissue(_NUMBER["lesion_fluid"], -60.0, 0.02)
GROUND_GLASS = Tissue(_NUMBER["lesion_fluid"], -14.0, 0.10)
STONE = Tissue(_NUMBER["lesion_bright"], 26.0, 30.0)


def solid(echo: float, attenuation: float) -> Tissue:
    """Solid tissue of a lesion."""
    return Tissue(_NUMBER["lesion_solid"], echo, attenuation)


def bright(echo: float, attenuation: float) -> Tissue:
    """Tissue of a lesion that is brighter than its surroundings."""
    return Tissue(_NUMBER["lesion_bright"], echo, attenuation)
