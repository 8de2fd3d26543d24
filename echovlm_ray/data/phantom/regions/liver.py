"""Liver, in the terms of US LI-RADS (ACR) and of the usual signs of diffuse disease."""

from echovlm_ray.data.phantom.schema import (
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

_BACKGROUND = "echogenicity=normal texture=homogeneous surface=smooth"
_FOCAL = f"{_BACKGROUND} lesion=focal size=small|medium|large depth=superficial|deep"

LIVER = Region(
    organ="liver",
    subject=words("liver", "肝脏", also_en="hepatic", also_zh="肝"),
    probe="convex",
    mirrors=False,
    attributes=(
        Attribute(
            "echogenicity",
            words("What is the echogenicity of the liver?", "肝实质回声强度如何？"),
            {
                "normal": words("normal echogenicity", "回声强度正常"),
                "increased": words("increased echogenicity", "回声增强"),
            },
        ),
        Attribute(
            "beam",
            words("How do the deep parts of the liver look?", "肝脏深部回声如何？"),
            {"attenuated": words("deep attenuation", "深部衰减")},
        ),
        Attribute(
            "texture",
            words("What is the texture of the liver?", "肝实质质地如何？"),
            {
                "homogeneous": words("homogeneous texture", "质地均匀", also_zh="回声均匀"),
                "coarse": words("coarse texture", "质地粗糙", also_zh="回声增粗"),
            },
        ),
        Attribute(
            "surface",
            words("What is the surface of the liver like?", "肝表面如何？"),
            {
                "smooth": words("smooth surface", "表面光滑"),
                "nodular": words("nodular surface", "表面结节状", also_zh="表面不平"),
            },
        ),
        Attribute(
            "ascites",
            words("Is there ascites?", "有腹水吗？"),
            {"absent": words("no ascites", "无腹水"), "present": words("ascites", "有腹水", also_zh="腹水")},
        ),
        Attribute(
            "lesion",
            words("Is there a focal lesion in the liver?", "肝内有局灶性病变吗？"),
            {
                "none": words("no focal lesion", "未见局灶性病变"),
                "focal": words("focal lesion|a focal lesion", "局灶性病变"),
            },
        ),
        size_attribute(),
        depth_attribute(),
        Attribute(
            "echo",
            words("What is the echogenicity of the lesion?", "病灶的回声如何？"),
            {
                "anechoic": words("anechoic", "无回声"),
                "hyperechoic": words("hyperechoic", "高回声"),
                "hypoechoic": words("hypoechoic", "低回声"),
            },
        ),
        posterior_attribute("none|enhancement"),
    ),
    classes=(
        PhantomClass("normal", words("normal liver", "肝脏未见异常"), choices(f"{_BACKGROUND} lesion=none")),
        PhantomClass(
            "steatosis",
            words("steatosis", "脂肪肝", also_en="fatty liver"),
            choices("echogenicity=increased beam=attenuated texture=homogeneous surface=smooth lesion=none"),
        ),
        PhantomClass(
            "simple_cyst",
            words("simple cyst", "单纯囊肿", also_zh="肝囊肿"),
            choices(f"{_FOCAL} echo=anechoic posterior=enhancement"),
        ),
        PhantomClass(
            "haemangioma",
            words("haemangioma", "血管瘤", also_en="hemangioma"),
            choices(f"{_FOCAL} echo=hyperechoic posterior=none"),
        ),
        PhantomClass(
            "hypoechoic_lesion",
            words("solid focal lesion, malignancy not excluded", "实性占位，恶性不除外"),
            choices(f"{_FOCAL} echo=hypoechoic posterior=none"),
        ),
        PhantomClass(
            "cirrhosis",
            words("cirrhosis", "肝硬化"),
            choices("echogenicity=normal texture=coarse surface=nodular ascites=absent|present lesion=none"),
        ),
    ),
    sentences=(
        Sentence(None, ("echogenicity", "beam", "texture", "surface", "ascites")),
        Sentence("lesion", ("size", "depth", "echo", "posterior")),
    ),
)
