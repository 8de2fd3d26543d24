"""Names and descriptions of the seven organs, for the manifests of bundles; see also `router.gating.anatomy`."""

from collections.abc import Mapping

ORGAN_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "breast": ("breasts", "mamma", "mammary gland", "乳腺", "乳房"),
    "gynaecology": ("gynecology", "uterus", "ovary", "ovaries", "endometrium", "妇科", "子宫", "卵巢"),
    "heart": ("cardiac", "echocardiography", "echocardiogram", "心脏"),
    "kidney": ("kidneys", "renal", "urinary tract", "肾", "肾脏"),
    "liver": ("hepatic", "肝", "肝脏"),
    "thyroid": ("thyroid gland", "甲状腺"),
    "vessel": ("vessels", "vascular", "carotid", "artery", "vein", "血管"),
}
