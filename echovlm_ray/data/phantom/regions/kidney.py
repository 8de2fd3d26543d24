"""Kidney, hydronephrosis in the grades of the Society for Fetal Urology (SFU)."""

from echovlm_ray.data.phantom.schema import (
    SIDE_ATTRIBUTE,
    Attribute,
    PhantomClass,
    Region,
    Sentence,
    choices,
    posterior_attribute,
    size_attribute,
    words,
)

_BACKGROUND = "collecting=not_dilated parenchyma=normal"

KIDNEY = Region(
    organ="kidney",
    subject=words("{side} kidney", "{side}肾脏", also_en="renal", also_zh="肾"),
    probe="convex",
    mirrors=True,
    attributes=(
        SIDE_ATTRIBUTE,
        Attribute(
            "collecting",
            words("Is the collecting system dilated?", "集合系统有扩张吗？"),
            {
                "not_dilated": words(
                    "undilated collecting system", "集合系统无扩张", "collecting system not dilated", "集合系统未见分离"
                ),
                "mild": words("mildly dilated collecting system", "集合系统轻度扩张"),
                "marked": words("markedly dilated collecting system", "集合系统重度扩张"),
            },
        ),
        Attribute(
            "parenchyma",
            words("How thick is the parenchyma?", "肾实质厚度如何？"),
            {
                "normal": words("normal parenchymal thickness", "实质厚度正常"),
                "thinned": words("thinned parenchyma", "实质变薄"),
            },
        ),
        Attribute(
            "lesion",
            words("Is there a focal lesion or a stone?", "有局灶性病变或结石吗？"),
            {
                "none": words("no focal lesion", "未见局灶性病变"),
                "focal": words("focal lesion|a focal lesion", "局灶性病变"),
                "stone": words("stone|a stone", "强回声结石", also_zh="结石"),
            },
        ),
        size_attribute("small|large"),
        Attribute(
            "site",
            words("Where in the organ does the lesion lie?", "病灶位于何处？"),
            {"cortex": words("in the cortex", "位于皮质"), "sinus": words("in the sinus", "位于肾窦")},
        ),
        Attribute(
            "echo",
            words("What is the echogenicity of the lesion?", "病灶的回声如何？"),
            {"anechoic": words("anechoic", "无回声"), "hyperechoic": words("hyperechoic", "高回声")},
        ),
        posterior_attribute(),
    ),
    classes=(
        PhantomClass("normal", words("normal kidney", "肾脏未见异常"), choices(f"{_BACKGROUND} lesion=none")),
        PhantomClass(
            "mild_hydronephrosis",
            words("mild hydronephrosis", "轻度肾积水"),
            choices("collecting=mild parenchyma=normal lesion=none"),
        ),
        PhantomClass(
            "marked_hydronephrosis",
            words("marked hydronephrosis", "重度肾积水"),
            choices("collecting=marked parenchyma=thinned lesion=none"),
        ),
        PhantomClass(
            "simple_cyst",
            words("simple cyst", "单纯囊肿", also_zh="肾囊肿"),
            choices(f"{_BACKGROUND} lesion=focal size=small|large site=cortex echo=anechoic posterior=enhancement"),
        ),
        PhantomClass(
            "stone",
            words("kidney stone", "肾结石", also_en="renal stone|nephrolithiasis"),
            choices(f"{_BACKGROUND} lesion=stone size=small|large site=sinus posterior=shadowing"),
        ),
        PhantomClass(
            "angiomyolipoma",
            words("angiomyolipoma", "血管平滑肌脂肪瘤"),
            choices(f"{_BACKGROUND} lesion=focal size=small|large site=cortex echo=hyperechoic posterior=none"),
        ),
    ),
    sentences=(
        Sentence(None, ("collecting", "parenchyma")),
        Sentence("lesion", ("size", "site", "echo", "posterior")),
    ),
)
