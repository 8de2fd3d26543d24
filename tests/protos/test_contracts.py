"""Holds what the contracts tell the compilers of other languages, so that their stubs are made without flags."""

import pytest

from protos.generate import ROOT

CONTRACTS = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_contract_names_its_packages(contract: str) -> None:
    module = __import__(f"protos.{contract.removesuffix('.proto')}_pb2", fromlist=["DESCRIPTOR"])
    options = module.DESCRIPTOR.GetOptions()
    assert options.go_package == "echovlm-ray/echovlmv1"
    assert options.java_package == "echovlm.v1"
    assert options.java_multiple_files
    assert options.java_outer_classname == contract.removesuffix(".proto").capitalize() + "Proto"
    assert options.csharp_namespace == "Echovlm.V1"
    assert module.DESCRIPTOR.package == "echovlm.v1"
