"""Uterus and adnexa, in the terms of O-RADS US (ACR, v2022) and of MUSA for leiomyoma."""

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

_CYST = "lesion=cyst size=small|medium|large"

GYNAECOLOGY = Region(
    organ="gynaecology",
    subject=words(
        "uterus and {side} adnexa", "子宫及{side}附件", also_en="uterus|adnexa|ovary|pelvis", also_zh="子宫|附件|卵巢"
    ),
    probe="convex",
    mirrors=True,
    attributes=(
        SIDE_ATTRIBUTE,
        Attribute(
            "lesion",
            words("Is there a mass?", "有包块吗？"),
            {
                "none": words("no mass", "未见包块"),
                "cyst": words("adnexal cyst|an adnexal cyst", "囊性包块"),
                "myometrial": words("myometrial mass|a myometrial mass", "肌层包块"),
            },
        ),
        size_attribute(),
        Attribute(
            "locules",
            words("How many locules does the cyst have?", "囊性包块是单房还是多房？"),
            {
                "unilocular": words("unilocular", "单房"),
                "multilocular": words("multilocular with thin septa", "多房伴细分隔", "multilocular", "多房"),
            },
        ),
        Attribute(
            "contents",
            words("What are the contents of the cyst?", "囊内容物回声如何？"),
            {
                "anechoic": words("anechoic contents", "囊液无回声", also_en="anechoic", also_zh="无回声"),
                "ground_glass": words(
                    "ground-glass contents", "囊液毛玻璃样回声", "ground glass|low-level echoes", "毛玻璃样|毛玻璃"
                ),
            },
        ),
        Attribute(
            "solid",
            words("Does the cyst have a solid part?", "囊内有实性部分吗？"),
            {
                "absent": words("no solid part", "无实性部分"),
                "present": words("with a solid part", "有实性部分", also_en="solid part", also_zh="实性部分"),
            },
        ),
        Attribute(
            "site",
            words("Where in the wall of the uterus does the mass lie?", "肌层包块位于何处？"),
            {
                "intramural": words("intramural", "肌壁间"),
                "subserosal": words("subserosal", "浆膜下"),
            },
        ),
        Attribute(
            "echo",
            words("What is the echogenicity of the myometrial mass?", "肌层包块的回声如何？"),
            {"hypoechoic": words("hypoechoic", "低回声")},
        ),
        Attribute(
            "posterior",
            words("What is seen behind the lesion?", "病灶后方回声如何？"),
            {
                "enhancement": words("posterior enhancement", "后方回声增强"),
                "striped": words("striped shadows|fan-shaped shadows", "条状声影", also_en="fan-shaped shadowing"),
            },
        ),
    ),
    classes=(
        PhantomClass("normal", words("normal uterus and adnexa", "子宫及附件未见异常"), choices("lesion=none")),
        PhantomClass(
            "unilocular_cyst",
            words("simple adnexal cyst", "附件单纯囊肿"),
            choices(f"{_CYST} locules=unilocular contents=anechoic solid=absent posterior=enhancement"),
        ),
        PhantomClass(
            "multilocular_cyst",
            words("multilocular adnexal cyst", "附件多房囊肿"),
            choices(f"{_CYST} locules=multilocular contents=anechoic solid=absent posterior=enhancement"),
        ),
        PhantomClass(
            "cyst_with_solid_part",
            words("suspicious adnexal cyst with a solid part", "附件可疑囊实性包块"),
            choices(f"{_CYST} locules=unilocular contents=anechoic solid=present posterior=enhancement"),
        ),
        PhantomClass(
            "endometrioma",
            words("endometrioma", "子宫内膜异位囊肿"),
            choices(f"{_CYST} locules=unilocular contents=ground_glass solid=absent posterior=enhancement"),
        ),
        PhantomClass(
            "leiomyoma",
            words("leiomyoma of the uterus", "子宫肌瘤", also_en="leiomyoma|fibroid"),
            choices(
                "lesion=myometrial size=small|medium|large site=intramural|subserosal echo=hypoechoic posterior=striped"
            ),
        ),
    ),
    sentences=(
        Sentence(None, ()),
        Sentence("lesion", ("size", "locules", "contents", "solid", "site", "echo", "posterior")),
    ),
)
