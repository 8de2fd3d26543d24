"""Heart in the apical four-chamber view, in the terms of ASE and ESC."""

from echovlm_ray.data.phantom.schema import Attribute, PhantomClass, Region, Sentence, choices, words

HEART = Region(
    organ="heart",
    subject=words("heart, apical four-chamber view", "心脏心尖四腔切面", also_en="heart|cardiac", also_zh="心脏"),
    probe="sector",
    mirrors=False,
    attributes=(
        Attribute(
            "cavity",
            words("What is the size of the left ventricle?", "左心室腔大小如何？"),
            {
                "normal": words("normal left ventricular cavity", "左室腔正常"),
                "dilated": words("dilated left ventricular cavity", "左室腔扩大"),
            },
        ),
        Attribute(
            "wall",
            words("How thick are the walls of the left ventricle?", "左心室壁厚度如何？"),
            {
                "normal": words("normal wall thickness", "室壁厚度正常"),
                "thickened": words("thickened walls", "室壁增厚"),
            },
        ),
        Attribute(
            "atrium",
            words("What is the size of the left atrium?", "左心房大小如何？"),
            {
                "normal": words("normal left atrium", "左房正常"),
                "enlarged": words("enlarged left atrium", "左房增大"),
            },
        ),
        Attribute(
            "effusion",
            words("Is there a pericardial effusion?", "有心包积液吗？"),
            {
                "absent": words("no pericardial effusion", "无心包积液"),
                "small": words("small pericardial effusion|a small pericardial effusion", "少量心包积液"),
                "large": words("large pericardial effusion|a large pericardial effusion", "大量心包积液"),
            },
        ),
        Attribute(
            "thrombus",
            words("Is there an apical thrombus?", "有心尖血栓吗？"),
            {
                "absent": words("no apical thrombus", "无心尖血栓"),
                "present": words("apical thrombus|an apical thrombus", "心尖血栓"),
            },
        ),
    ),
    classes=(
        PhantomClass(
            "normal",
            words("normal heart", "心脏未见异常"),
            choices("cavity=normal wall=normal atrium=normal effusion=absent thrombus=absent"),
        ),
        PhantomClass(
            "hypertrophy",
            words("left ventricular hypertrophy", "左心室肥厚"),
            choices("cavity=normal wall=thickened atrium=normal|enlarged effusion=absent thrombus=absent"),
        ),
        PhantomClass(
            "dilatation",
            words("left ventricular dilatation", "左心室扩张"),
            choices("cavity=dilated wall=normal atrium=normal|enlarged effusion=absent thrombus=absent"),
        ),
        PhantomClass(
            "small_effusion",
            words("small pericardial effusion", "少量心包积液"),
            choices("cavity=normal wall=normal atrium=normal|enlarged effusion=small thrombus=absent"),
        ),
        PhantomClass(
            "large_effusion",
            words("large pericardial effusion", "大量心包积液"),
            choices("cavity=normal wall=normal atrium=normal|enlarged effusion=large thrombus=absent"),
        ),
        PhantomClass(
            "apical_thrombus",
            words("apical thrombus of the left ventricle", "左心室心尖血栓", "apical thrombus", "心尖血栓"),
            choices("cavity=normal|dilated wall=normal atrium=normal|enlarged effusion=absent thrombus=present"),
        ),
    ),
    sentences=(
        Sentence(None, ("cavity", "wall", "atrium")),
        Sentence("effusion", ()),
        Sentence("thrombus", ()),
    ),
)
