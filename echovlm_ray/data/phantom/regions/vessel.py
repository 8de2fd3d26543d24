"""Vessels in long-axis section, with the grades of stenosis of the SRU consensus (Grant 2003), by visible diameter."""

from echovlm_ray.data.phantom.schema import SIDE_ATTRIBUTE, Attribute, PhantomClass, Region, Sentence, choices, words

VESSEL = Region(
    organ="vessel",
    subject=words("{side} vessel", "{side}血管", also_en="artery|vein|carotid", also_zh="动脉|静脉"),
    probe="linear",
    mirrors=True,
    attributes=(
        SIDE_ATTRIBUTE,
        Attribute(
            "lumen",
            words("What does the lumen look like?", "管腔如何？"),
            {
                "clear": words("clear lumen of even width", "管腔通畅粗细均匀"),
                "narrowed": words("narrowed lumen", "管腔变窄"),
                "dilated": words("widened lumen", "管腔局部增宽"),
                "filled": words("lumen filled with echoes", "管腔内充满回声"),
            },
        ),
        Attribute(
            "plaque",
            words("Is there plaque, and of which kind?", "有斑块吗？是哪一种？"),
            {
                "none": words("no plaque", "未见斑块"),
                "calcified": words("calcified plaque", "钙化斑块"),
                "hypoechoic": words("hypoechoic plaque", "低回声斑块"),
                "echogenic": words("echogenic plaque", "高回声斑块"),
            },
        ),
        Attribute(
            "wall",
            words("On which wall does the plaque lie?", "斑块位于哪一侧管壁？"),
            {
                "near": words("on the near wall", "位于前壁"),
                "far": words("on the far wall", "位于后壁"),
                "both": words("on both walls", "位于前后壁"),
            },
        ),
        Attribute(
            "reduction",
            words("By how much is the diameter reduced?", "内径减少多少？"),
            {
                "below_50": words("diameter reduction below 50 percent", "内径减少小于50%", "below 50%", "小于50%"),
                "50_to_69": words("diameter reduction 50 to 69 percent", "内径减少50%至69%", "50-69%", "50%-69%"),
                "70_or_more": words(
                    "diameter reduction 70 percent or more", "内径减少70%以上", "70% or more", "70%以上"
                ),
            },
        ),
        Attribute(
            "posterior",
            words("Is there a shadow behind the plaque?", "斑块后方有声影吗？"),
            {
                "none": words("no shadow", "无声影"),
                "shadowing": words(
                    "posterior shadowing", "后方伴声影", also_en="acoustic shadow|shadowing", also_zh="声影"
                ),
            },
        ),
        Attribute(
            "form",
            words("What is the form of the dilatation?", "扩张是什么形态？"),
            {
                "fusiform": words("fusiform dilatation", "梭形扩张", "fusiform", "梭形"),
                "saccular": words("saccular dilatation", "囊状扩张", "saccular", "囊状"),
            },
        ),
    ),
    classes=(
        PhantomClass("normal", words("normal vessel", "血管未见异常"), choices("lumen=clear plaque=none")),
        PhantomClass(
            "calcified_plaque",
            words("calcified plaque without relevant stenosis", "钙化斑块，无明显狭窄"),
            choices("lumen=narrowed plaque=calcified wall=near|far reduction=below_50 posterior=shadowing"),
        ),
        PhantomClass(
            "hypoechoic_plaque",
            words("hypoechoic plaque without relevant stenosis", "低回声斑块，无明显狭窄"),
            choices("lumen=narrowed plaque=hypoechoic wall=near|far reduction=below_50 posterior=none"),
        ),
        PhantomClass(
            "stenosis_below_50",
            words("stenosis below 50 percent", "狭窄小于50%"),
            choices("lumen=narrowed plaque=echogenic wall=both reduction=below_50 posterior=none"),
        ),
        PhantomClass(
            "stenosis_50_to_69",
            words("stenosis of 50 to 69 percent", "狭窄50%至69%"),
            choices("lumen=narrowed plaque=echogenic wall=both reduction=50_to_69 posterior=none"),
        ),
        PhantomClass(
            "stenosis_70_or_more",
            words("stenosis of 70 percent or more", "狭窄70%以上"),
            choices("lumen=narrowed plaque=echogenic wall=both reduction=70_or_more posterior=none"),
        ),
        PhantomClass(
            "aneurysm",
            words("aneurysm", "动脉瘤"),
            choices("lumen=dilated plaque=none form=fusiform|saccular"),
        ),
        PhantomClass(
            "thrombus",
            words("thrombus", "血栓", also_en="thrombosis"),
            choices("lumen=filled plaque=none"),
        ),
    ),
    sentences=(
        Sentence(None, ("lumen", "form")),
        Sentence("plaque", ("wall", "reduction", "posterior")),
    ),
)
