"""Thyroid, one lobe in transverse section, in the terms of ACR TI-RADS (Tessler 2017)."""

from echovlm_ray.data.phantom.schema import (
    SIDE_ATTRIBUTE,
    Attribute,
    PhantomClass,
    Region,
    Sentence,
    choices,
    size_attribute,
    words,
)

_NODULE = "parenchyma=homogeneous lesion=nodule size=small|large"

THYROID = Region(
    organ="thyroid",
    subject=words("{side} thyroid", "{side}甲状腺"),
    probe="linear",
    mirrors=True,
    attributes=(
        SIDE_ATTRIBUTE,
        Attribute(
            "parenchyma",
            words("What does the parenchyma look like?", "腺体实质回声如何？"),
            {
                "homogeneous": words("homogeneous parenchyma", "实质回声均匀"),
                "diffuse": words(
                    "diffusely hypoechoic parenchyma", "实质弥漫性低回声", also_en="diffuse hypoechoic parenchyma"
                ),
            },
        ),
        Attribute(
            "lesion",
            words("Is there a nodule in the gland?", "腺体内有结节吗？"),
            {"none": words("no nodule", "未见结节"), "nodule": words("nodule|a nodule", "结节")},
        ),
        size_attribute("small|large"),
        Attribute(
            "composition",
            words("What is the composition of the nodule?", "结节的成分如何？"),
            {
                "cystic": words("cystic", "囊性"),
                "spongiform": words("spongiform", "海绵状"),
                "solid": words("solid", "实性"),
            },
        ),
        Attribute(
            "echogenicity",
            words("What is the echogenicity of the nodule?", "结节的回声如何？"),
            {
                "anechoic": words("anechoic", "无回声"),
                "isoechoic": words("isoechoic", "等回声"),
                "very_hypoechoic": words("very hypoechoic", "极低回声", also_en="markedly hypoechoic"),
            },
        ),
        Attribute(
            "shape",
            words("What is the shape of the nodule?", "结节是什么形状？"),
            {
                "wider": words("wider than tall|wider-than-tall", "宽大于高"),
                "taller": words("taller than wide|taller-than-wide", "高大于宽", also_zh="纵横比大于一|纵横比大于1"),
            },
        ),
        Attribute(
            "margin",
            words("What is the margin of the nodule?", "结节的边缘如何？"),
            {
                "smooth": words("smooth margin", "边缘光滑", also_en="smooth"),
                "irregular": words("irregular margin", "边缘不规则", also_en="lobulated margin"),
            },
        ),
        Attribute(
            "foci",
            words("Are there echogenic foci in the nodule?", "结节内有强回声灶吗？"),
            {
                "none": words("no echogenic foci", "无强回声灶"),
                "comet_tail": words("comet-tail artefacts", "彗星尾征", also_en="comet-tail artifacts|comet tail"),
                "punctate": words(
                    "punctate echogenic foci", "点状强回声灶", also_en="punctate foci", also_zh="点状强回声"
                ),
            },
        ),
    ),
    classes=(
        PhantomClass(
            "normal", words("normal thyroid", "甲状腺未见异常"), choices("parenchyma=homogeneous lesion=none")
        ),
        PhantomClass(
            "colloid_cyst",
            words("colloid cyst", "胶质囊肿"),
            choices(f"{_NODULE} composition=cystic echogenicity=anechoic shape=wider margin=smooth foci=comet_tail"),
        ),
        PhantomClass(
            "spongiform_nodule",
            words("benign spongiform nodule", "良性海绵状结节", "spongiform nodule", "海绵状结节"),
            choices(f"{_NODULE} composition=spongiform shape=wider margin=smooth foci=none"),
        ),
        PhantomClass(
            "isoechoic_nodule",
            words("mildly suspicious solid nodule", "轻度可疑实性结节"),
            choices(f"{_NODULE} composition=solid echogenicity=isoechoic shape=wider margin=smooth foci=none"),
        ),
        PhantomClass(
            "suspicious_nodule",
            words("highly suspicious solid nodule", "高度可疑实性结节"),
            choices(
                f"{_NODULE} composition=solid echogenicity=very_hypoechoic shape=taller margin=smooth|irregular "
                "foci=punctate"
            ),
        ),
        PhantomClass(
            "diffuse_disease",
            words("diffuse thyroid disease, as in thyroiditis", "弥漫性病变，如甲状腺炎", "thyroiditis", "甲状腺炎"),
            choices("parenchyma=diffuse lesion=none"),
        ),
    ),
    sentences=(
        Sentence(None, ("parenchyma",)),
        Sentence("lesion", ("size", "composition", "echogenicity", "shape", "margin", "foci")),
    ),
)
