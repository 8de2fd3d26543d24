"""The training text of the demo's tokenizer: written for this project, without patients' data.

It only determines the tokenization. The demo model was not trained on it.
"""

ENGLISH = """
Ultrasound findings: Ultrasound impression: No abnormality detected. Please describe the ultrasound image.
Please write the ultrasound report for this examination. What does the image show? Give the diagnosis.
Describe this picture in one sentence. You are a helpful assistant. Answer the question about the images.
Write the findings section. Write the impression section. Which organ is shown in this ultrasound image?
The breast shows a hypoechoic nodule with irregular margins, not parallel to the skin, with posterior shadowing.
A circumscribed oval anechoic cyst with posterior acoustic enhancement lies in the upper outer quadrant.
Fibroglandular tissue is heterogeneous. The ducts are not dilated. Axillary lymph nodes keep a fatty hilum.
Microcalcifications are seen within the lesion. BI-RADS category 2, 3, 4A, 4B, 4C and 5. Biopsy is suggested.
The fibroadenoma is stable compared with the previous examination. Elastography shows a soft lesion.
The uterus is anteverted and of normal size. The endometrium is 8 mm thick and uniform. No fibroid is visible.
A subserosal leiomyoma protrudes from the anterior wall. The right ovary contains follicles of different sizes.
A corpus luteum with a ring of vessels is present. Free fluid in the pouch of Douglas is physiological.
The cervix is closed. A gestational sac with a yolk sac and an embryo with cardiac activity is seen.
The left ovary holds a septated cystic mass without solid parts; an endometrioma with low level echoes is likely.
The left ventricle has normal dimensions and a normal systolic function; the ejection fraction is 62 percent.
Wall motion is regular at rest. The mitral valve opens well with trivial regurgitation. The aortic valve is tricuspid.
Mild thickening of the leaflets without stenosis. The left atrium is enlarged. The right ventricle is not dilated.
Tricuspid regurgitation allows an estimate of the pulmonary artery pressure. No pericardial effusion.
The interventricular septum is hypertrophied. Diastolic function is impaired, with a reduced early filling wave.
The apical four chamber view and the parasternal long axis view were recorded as cine loops.
Both kidneys have a regular outline and a normal length. The cortex is well separated from the medulla.
The collecting system is dilated on the right side: hydronephrosis of moderate degree with a stone in the ureter.
A simple cortical cyst at the lower pole measures 23 x 19 mm. Several small calculi with twinkling artefact.
The renal parenchyma is thin and echogenic, which fits chronic kidney disease. The bladder wall is smooth.
An angiomyolipoma appears as a bright well defined mass. Renal perfusion is symmetric on colour Doppler.
The liver is enlarged with increased echogenicity and attenuation of the beam, in keeping with fatty infiltration.
The surface is nodular and the texture coarse: cirrhosis. The portal vein is patent with hepatopetal flow.
A haemangioma is hyperechoic, sharply defined and without halo. The gallbladder contains mobile stones and sludge.
The common bile duct is not widened. The spleen is of normal size. Ascites is absent. The pancreas is partly hidden.
A focal lesion in segment VI shows arterial enhancement and washout, suspicious for hepatocellular carcinoma.
The thyroid lobes are symmetric, with homogeneous parenchyma. The isthmus is thin. No enlarged cervical nodes.
A solid nodule, taller than wide, with punctate echogenic foci and ill defined borders; TI-RADS 5, aspiration advised.
A spongiform nodule needs no follow up. Diffuse hypoechoic texture with increased vascularity suggests thyroiditis.
The parathyroid glands are not seen. Colloid cysts with comet tail artefacts are benign.
The common carotid artery has a smooth intima; intima media thickness is 0.7 mm. A calcified plaque at the bifurcation.
Stenosis of the internal carotid artery is below 50 percent by velocity criteria. The vertebral artery flows forward.
The femoral vein is fully compressible, phasic flow with respiration, no thrombus.
The great saphenous vein is reflux free.
The popliteal artery shows a triphasic waveform. An aneurysm of the abdominal aorta measures 41 mm across.
Peak systolic velocity, end diastolic velocity, resistance index and pulsatility index were measured.
Spectral Doppler of the arteries.
The transducer was a linear, convex, phased or endocavitary array. Image quality is limited by gas and body habitus.
Recommendation: follow up in six months, twelve months, or earlier if symptoms change. Correlate with laboratory values.
Clinical question: pain, swelling, palpable lump, fever, bleeding, screening, pregnancy, hypertension, jaundice, stroke.
Compared with the earlier study the lesion has grown slightly, has become smaller, or has remained unchanged.
In summary, findings are most consistent with a benign process; malignancy cannot be excluded by ultrasound alone.
Measurements in millimetres and centimetres: length, width, depth, volume, distance, angle, area, circumference.
Left, right, bilateral, anterior, posterior, superior, inferior, medial, lateral, proximal, distal, superficial, deep.
Homogeneous, heterogeneous, isoechoic, mixed, cystic, solid, complex, lobulated, spiculated, angular, indistinct.
Normal, abnormal, mild, moderate, severe, acute, chronic, focal, diffuse, single, multiple, small, large, visible.
Vascular flow inside, around and beside the lesion; avascular; power Doppler; aliasing; turbulence; spectral broadening.
The examination was performed with the patient lying supine, prone, sitting, standing, or turned to the left side.
One two three four five six seven eight nine ten; first, second, third; before and after; during; between; within.
It is not a medical device and must not be used for diagnosis. The answer of this demonstration has no meaning.
"""

CHINESE = """
超声所见：超声提示：未见明显异常。请描述这张超声图像。请根据图像书写超声报告。图像显示了什么？请给出诊断。
请用一句话描述图片。请写出超声所见部分。请写出超声提示部分。这张超声图像显示的是哪个器官？请回答关于图像的问题。
乳腺内可见低回声结节，边界不清，形态不规则，纵横比大于一，后方回声衰减。内可见点状强回声。
双侧乳腺腺体层结构紊乱，导管未见扩张。右乳外上象限见无回声区，边界清，后方回声增强，考虑囊肿。
腋窝淋巴结皮髓质分界清。建议穿刺活检。乳腺影像报告分级二类，三类，四类。考虑纤维腺瘤，建议定期复查。
子宫前位，大小正常，内膜厚约八毫米，回声均匀。肌层内见低回声团，考虑子宫肌瘤。宫颈未见异常。
右侧卵巢内见多个卵泡。左侧附件区见囊性包块，内见分隔。盆腔见少量积液。宫内早孕，可见胎心搏动。
左心室内径正常，室壁运动协调，收缩功能正常，射血分数百分之六十二。二尖瓣轻度反流，主动脉瓣回声增强。
左心房增大，右心室不大，三尖瓣少量反流，估测肺动脉压正常。心包腔未见积液。舒张功能减低。室间隔增厚。
双肾形态大小正常，皮质回声均匀，集合系统未见分离。右肾积水，输尿管上段结石。左肾下极见囊肿。
肾实质变薄，回声增强，符合慢性肾病改变。膀胱充盈良好，壁光滑。肾血流灌注良好。考虑错构瘤。
肝脏体积增大，实质回声细密增强，后方衰减，考虑脂肪肝。肝表面不平，回声增粗，考虑肝硬化。
门静脉血流通畅。肝右叶见高回声团，边界清，考虑血管瘤。胆囊内见结石伴声影，胆总管不扩张。
脾脏大小正常，胰腺显示不清，腹腔未见积液。动脉期增强，门脉期廓清，不除外肝细胞癌。
甲状腺两侧叶对称，回声均匀，峡部不厚。甲状腺右叶见实性结节，纵横比大于一，边缘模糊，建议细针穿刺。
甲状腺弥漫性病变，血流丰富，考虑桥本甲状腺炎。颈部未见肿大淋巴结。胶质囊肿，良性可能。
颈动脉内中膜不厚，分叉处见钙化斑块，管腔狭窄小于百分之五十。椎动脉血流方向正常。
股静脉可压闭，未见血栓，血流随呼吸变化。大隐静脉未见反流。腘动脉呈三相波形。腹主动脉瘤样扩张。
收缩期峰值流速，舒张末期流速，阻力指数，搏动指数。频谱多普勒，彩色多普勒，能量多普勒。
与前次检查比较，病灶略增大，缩小，无变化。建议六个月后复查，建议结合临床及实验室检查。
左侧，右侧，双侧，前壁，后壁，上段，中段，下段，内侧，外侧，近端，远端，浅部，深部。
等回声，混合回声，囊性，实性，分叶状，毛刺状，均匀，不均匀，清晰，模糊，规则，不规则。
正常，异常，轻度，中度，重度，急性，慢性，局灶性，弥漫性，单发，多发。
大小约，长径，宽径，厚度，体积，距离，面积，毫米，厘米，毫升。
本演示模型的回答没有任何意义，不是医疗器械，不能用于诊断。你是一个有用的助手。
"""
