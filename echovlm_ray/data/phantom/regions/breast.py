"""Breast, in the terms of BI-RADS US (ACR, 5th edition)."""

from echovlm_ray.data.phantom.schema import (
    SIDE_ATTRIBUTE,
    Attribute,
    PhantomClass,
    Region,
    Sentence,
    choices,
    depth_attribute,
    posterior_attribute,
    size_attribute,
    words,
)

_TISSUE = "tissue=fatty|fibroglandular|mixed"
_MASS = f"{_TISSUE} lesion=mass size=small|medium|large depth=superficial|deep"

BREAST = Region(
    organ="breast",
    subject=words("{side} breast", "{side}乳腺", also_en="mammary"),
    probe="linear",
    mirrors=True,
    attributes=(
        SIDE_ATTRIBUTE,
        Attribute(
            "tissue",
            words("What is the tissue composition of the breast?", "乳腺组织构成如何？"),
            {
                "fatty": words("fatty tissue", "脂肪型组织"),
                "fibroglandular": words("fibroglandular tissue", "腺体型组织"),
                "mixed": words("mixed tissue|heterogeneous tissue", "混合型组织"),
            },
        ),
        Attribute(
            "lesion",
            words("Is there a mass in the breast?", "乳腺内有肿块吗？"),
            {"none": words("no mass", "未见肿块"), "mass": words("mass|a mass", "肿块")},
        ),
        size_attribute(),
        depth_attribute(),
        Attribute(
            "shape",
            words("What is the shape of the mass?", "肿块是什么形状？"),
            {
                "oval": words("oval", "椭圆形"),
                "irregular": words("irregular shape", "不规则形", also_en="irregular", also_zh="形态不规则"),
            },
        ),
        Attribute(
            "orientation",
            words("What is the orientation of the mass?", "肿块的方位如何？"),
            {
                "parallel": words("parallel to the skin|parallel orientation", "平行于皮肤", also_en="parallel"),
                "not_parallel": words(
                    "not parallel to the skin|not parallel orientation",
                    "不平行于皮肤",
                    also_en="not parallel|nonparallel|non-parallel",
                ),
            },
        ),
        Attribute(
            "margin",
            words("What is the margin of the mass?", "肿块的边缘如何？"),
            {
                "circumscribed": words("circumscribed margin", "边缘光整", also_en="circumscribed", also_zh="边界清晰"),
                "spiculated": words("spiculated margin", "边缘毛刺状", also_en="spiculated", also_zh="毛刺"),
            },
        ),
        Attribute(
            "echo",
            words("What is the echo pattern of the mass?", "肿块的回声如何？"),
            {
                "anechoic": words("anechoic", "无回声"),
                "hypoechoic": words("hypoechoic", "低回声"),
                "complex": words("cystic and solid parts", "囊实性回声", also_en="cystic and solid"),
            },
        ),
        posterior_attribute(),
    ),
    classes=(
        PhantomClass("normal", words("normal breast", "乳腺未见异常"), choices(f"{_TISSUE} lesion=none")),
        PhantomClass(
            "simple_cyst",
            words("simple cyst", "单纯囊肿"),
            choices(
                f"{_MASS} shape=oval orientation=parallel margin=circumscribed echo=anechoic posterior=enhancement"
            ),
        ),
        PhantomClass(
            "circumscribed_mass",
            words(
                "benign-looking solid mass, as in fibroadenoma", "良性实性肿块，如纤维腺瘤", "fibroadenoma", "纤维腺瘤"
            ),
            choices(
                f"{_MASS} shape=oval orientation=parallel margin=circumscribed echo=hypoechoic "
                "posterior=none|enhancement"
            ),
        ),
        PhantomClass(
            "spiculated_mass",
            words("suspicious mass, as in carcinoma", "可疑肿块，如乳腺癌", "carcinoma|breast cancer", "乳腺癌"),
            choices(
                f"{_MASS} shape=irregular orientation=not_parallel margin=spiculated echo=hypoechoic "
                "posterior=shadowing"
            ),
        ),
        PhantomClass(
            "complex_mass",
            words("complex cystic and solid mass", "囊实性复杂肿块"),
            choices(f"{_MASS} shape=oval orientation=parallel margin=circumscribed echo=complex posterior=enhancement"),
        ),
    ),
    sentences=(
        Sentence(None, ("tissue",)),
        Sentence("lesion", ("size", "depth", "shape", "orientation", "margin", "echo", "posterior")),
    ),
)
