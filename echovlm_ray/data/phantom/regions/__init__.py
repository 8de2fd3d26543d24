"""Attributes and classes of the seven regions, one module per region."""

from collections.abc import Mapping

from echovlm_ray.data.phantom.regions.breast import BREAST
from echovlm_ray.data.phantom.regions.gynaecology import GYNAECOLOGY
from echovlm_ray.data.phantom.regions.heart import HEART
from echovlm_ray.data.phantom.regions.kidney import KIDNEY
from echovlm_ray.data.phantom.regions.liver import LIVER
from echovlm_ray.data.phantom.regions.thyroid import THYROID
from echovlm_ray.data.phantom.regions.vessel import VESSEL
from echovlm_ray.data.phantom.schema import Organ, Region

REGIONS: Mapping[Organ, Region] = {
    region.organ: region for region in (BREAST, GYNAECOLOGY, HEART, KIDNEY, LIVER, THYROID, VESSEL)
}
