"""The checks before a SageMaker job, over HTTP on a fake account: each problem is found and has its remedy."""

import json
import os
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError

from llm_engineering.cloud.sagemaker import preflight
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import check, problems, trusts
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tests.conftest import ROOT
from tests.fakes.sagemaker import ACCOUNT, BUCKET, IMAGE, ROLE, FakeSageMaker, running_sagemaker

BLOCK = (
    "compute={target: sagemaker, sagemaker: {instance_type: ml.g5.2xlarge, "
    "fallback_instance_types: [ml.g5.xlarge], volume_size_gb: 40}}"
)


@pytest.fixture
def fake(monkeypatch, settings):
    with running_sagemaker() as fake:
        for name in [name for name in os.environ if name.startswith(("AWS_", "SAGEMAKER_"))]:
            monkeypatch.delenv(name)
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        yield fake


def make_recipe(small_llama, *changes: str) -> Recipe:
    return load_recipe(
        ROOT / "configs" / "python_reference.yaml", [f"model.name_or_path={small_llama}", BLOCK, *changes]
    )


@pytest.fixture
def recipe(small_llama) -> Recipe:
    return make_recipe(small_llama)


def found(recipe: Recipe) -> list:
    settings = Settings()
    return problems(recipe, Account.resolve(recipe.compute.sagemaker, settings), settings)


def the_one(recipe: Recipe, what: str, remedy: str, is_warning: bool = False) -> None:
    (problem,) = found(recipe)
    assert what in problem.what
    assert remedy in problem.remedy
    assert problem.is_warning == is_warning


def test_an_account_without_problems_logs_nothing(fake, recipe, caplog):
    assert found(recipe) == []
    settings = Settings()
    assert check(recipe, Account.resolve(recipe.compute.sagemaker, settings), settings) is None
    assert not caplog.records


def no_role(fake: FakeSageMaker) -> None:
    fake.client("iam").delete_role(RoleName="training")


def no_trust(fake: FakeSageMaker) -> None:
    statement = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    fake.client("iam").update_assume_role_policy(RoleName="training", PolicyDocument=document)


def no_image(fake: FakeSageMaker) -> None:
    ids = [{"imageTag": "training"}]
    fake.client("ecr").batch_delete_image(repositoryName="llm-engineering", imageIds=ids)


def no_repository(fake: FakeSageMaker) -> None:
    fake.client("ecr").delete_repository(repositoryName="llm-engineering", force=True)


@pytest.mark.parametrize(
    ("break_it", "what", "remedy"),
    [
        (lambda f: f.fail("sts", "GetCallerIdentity", "ExpiredToken"), "refused (ExpiredToken)", "aws sso login"),
        (no_role, "There is no role training", "aws iam create-role --role-name training"),
        (no_trust, "does not let sagemaker.amazonaws.com assume it", "docs/aws/job-trust.json"),
        (lambda f: f.denied.add("iam:PassRole"), "user/launcher may not pass the role", "iam:PassRole"),
        (lambda f: f.client("s3").delete_bucket(Bucket=BUCKET), "There is no bucket", f"aws s3 mb s3://{BUCKET}"),
        (lambda f: f.forbid("s3", "PutObject"), "cannot be written to", "s3:PutObject"),
        (no_image, "has no image", "make image"),
        (no_repository, "There is no repository llm-engineering", "make image"),
        (lambda f: f.quotas.update({"ml.g5.2xlarge for spot training job usage": 0.0}),
         "is 0, but the recipe asks for 1", "request-service-quota-increase --service-code sagemaker --quota-code L-00000003"
         " --desired-value 1 --region eu-west-1"),
        (lambda f: f.quotas.pop("ml.g5.2xlarge for spot training job usage"), "There is no quota", "another region"),
    ],
)  # fmt: skip
def test_each_problem_of_the_account(fake, recipe, break_it, what, remedy):
    break_it(fake)
    the_one(recipe, what, remedy)


@pytest.mark.parametrize(
    ("variable", "value", "what", "remedy"),
    [
        ("AWS_REGION", "eu-wst-1", "no region eu-wst-1", "eu-west-1"),
        ("SAGEMAKER_ROLE", ROLE.replace(ACCOUNT, "111122223333"), "is in account 111122223333", "same account"),
        ("SAGEMAKER_IMAGE", "docker.io/me/image:1", "is not in Amazon ECR", "make image"),
        ("SAGEMAKER_IMAGE", IMAGE.replace("eu-west-1", "us-east-1"), "is in us-east-1", "AWS_REGION=eu-west-1"),
        ("SAGEMAKER_SECRET", "nothing", "no secret nothing", "create-secret --name nothing"),
    ],
)
def test_each_problem_of_the_settings(fake, recipe, monkeypatch, variable, value, what, remedy):
    monkeypatch.setenv(variable, value)
    the_one(recipe, what, remedy)


def test_a_bucket_of_another_region(fake, recipe, monkeypatch):
    where = {"LocationConstraint": "eu-central-1"}
    fake.client("s3", region="eu-central-1").create_bucket(Bucket="far-away", CreateBucketConfiguration=where)
    monkeypatch.setenv("SAGEMAKER_BUCKET", "far-away")
    the_one(recipe, "far-away is in eu-central-1", "AWS_REGION=eu-central-1")


def test_without_credentials_nothing_else_is_asked(fake, recipe, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    the_one(recipe, "No AWS credentials", "aws configure sso")
    assert fake.requests == []


def test_unknown_instance_types(fake, small_llama):
    typo = make_recipe(small_llama, "compute.sagemaker.instance_type=ml.g5.2xlarg")
    unknown, no_quota = found(typo)
    assert "trains on no ml.g5.2xlarg" in unknown.what
    assert "ml.g5.2xlarge" in unknown.remedy
    assert "no quota" in no_quota.what
    # Known, but not in this region: by moto's copy of EC2's list.
    fake.quotas["ml.p6-b300.48xlarge for spot training job usage"] = 1.0
    far = make_recipe(small_llama, "compute.sagemaker.instance_type=ml.p6-b300.48xlarge")
    the_one(far, "eu-west-1 has no ml.p6-b300.48xlarge", "Choose another")


def test_on_demand_asks_another_quota_and_a_fallback_only_warns(fake, small_llama):
    fake.quotas["ml.g5.2xlarge for training job usage"] = 0.0
    fake.quotas["ml.g5.xlarge for spot training job usage"] = 0.0
    the_one(make_recipe(small_llama), "ml.g5.xlarge for spot", "request-service-quota-increase", is_warning=True)
    the_one(make_recipe(small_llama, "compute.sagemaker.use_spot=false"), "`ml.g5.2xlarge for training", "L-00000002")


def test_a_quota_that_is_listed_among_the_defaults_only(fake, recipe):
    name = "ml.g5.2xlarge for spot training job usage"
    del fake.quotas[name]
    fake.default_quotas |= {name: 0.0, "ml.g5.xlarge for spot training job usage": 0.0}
    # The quota of the fallback type was raised, and the raised value counts.
    the_one(recipe, f"The quota `{name}` is 0", "L-00000000")
    fake.default_quotas[name] = 1.0
    assert found(recipe) == []


def test_a_volume_that_is_too_small(fake, small_llama, monkeypatch):
    small = make_recipe(small_llama, "compute.sagemaker.volume_size_gb=10")
    the_one(small, "volume_size_gb 10 is too small", "Set it to 13 or more")
    # A float32 Llama: 4 bytes for each published weight; 12 · 3 and 4 for each trained weight.
    full = make_recipe(small_llama, "sft.method=full")
    from transformers import AutoModelForCausalLM

    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(small_llama).parameters())
    assert preflight.volume_bytes(full, Settings()) == weights * (4 + 36 + 4) + 10 * 2**30


def test_a_wait_that_is_less_than_the_run_is_refused_with_the_recipe(small_llama):
    with pytest.raises(RequestError, match="max_wait_s 60 is less than max_run_s 86400"):
        make_recipe(small_llama, "compute.sagemaker.max_wait_s=60")


def secret(fake: FakeSageMaker, monkeypatch, text: str) -> None:
    fake.client("secretsmanager").create_secret(Name="llm", SecretString=text)
    monkeypatch.setenv("SAGEMAKER_SECRET", "llm")


def test_a_gated_model_needs_a_token_in_the_secret(fake, recipe, monkeypatch):
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": "owner/gated"})})
    gated = SimpleNamespace(gated="manual", private=False)
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: gated)
    monkeypatch.setattr(HfApi, "auth_check", lambda *a, **k: None)
    monkeypatch.setattr(preflight, "volume_bytes", lambda *a: 0)
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    the_one(recipe, "needs HF_TOKEN, but SAGEMAKER_SECRET is not set", "aws secretsmanager create-secret")
    secret(fake, monkeypatch, '{"COMET_API_KEY": "planted"}')
    the_one(recipe, "The secret llm lacks HF_TOKEN", "put-secret-value --secret-id llm")
    fake.client("secretsmanager").put_secret_value(SecretId="llm", SecretString='{"HF_TOKEN": "hf_planted_token"}')
    assert found(recipe) == []
    monkeypatch.delenv("HF_TOKEN")
    the_one(recipe, "owner/gated is gated or private, and HF_TOKEN is not set", "Accept its licence")
    response = httpx.Response(403, request=httpx.Request("GET", "https://hf.co"))
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    monkeypatch.setattr(
        HfApi, "auth_check", lambda *a, **k: (_ for _ in ()).throw(GatedRepoError("no", response=response))
    )
    the_one(recipe, "The token may not load owner/gated", "https://hf.co/owner/gated")


@pytest.mark.parametrize("text", ["planted-value", '["planted-value"]', '{"A": 1}'])
def test_a_secret_of_another_form_is_reported_without_its_content(fake, recipe, monkeypatch, text):
    secret(fake, monkeypatch, text)
    the_one(recipe, "The secret llm is not a JSON object of strings", '{"HF_TOKEN": "..."}')
    assert "planted" not in str(found(recipe))


def test_several_problems_come_in_one_list(fake, small_llama, monkeypatch):
    no_trust(fake)
    no_image(fake)
    fake.quotas["ml.g5.2xlarge for spot training job usage"] = 0.0
    fake.forbid("ec2", "DescribeInstanceTypeOfferings")
    monkeypatch.setenv("SAGEMAKER_BUCKET", "no-such-bucket")
    recipe = make_recipe(small_llama, "compute.sagemaker.volume_size_gb=10")
    settings = Settings()
    with pytest.raises(RequestError) as error:
        check(recipe, Account.resolve(recipe.compute.sagemaker, settings), settings)
    lines = str(error.value).splitlines()
    assert "(5 problems)" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["The", "There", "The", "The", "compute.sagemaker.volume_size_gb"]


@pytest.mark.parametrize(
    ("service", "operation", "what"),
    [
        ("iam", "GetRole", f"The role {ROLE}"),
        ("iam", "SimulatePrincipalPolicy", "The right to pass the role"),
        ("s3", "HeadBucket", f"The bucket {BUCKET}"),
        ("ecr", "DescribeImages", f"The image {IMAGE}"),
        ("ec2", "DescribeInstanceTypeOfferings", "The instance types in eu-west-1"),
        ("servicequotas", "ListServiceQuotas", "The service quota"),
        ("secretsmanager", "GetSecretValue", "The secret"),
    ],
)
def test_a_check_that_is_forbidden_is_a_warning(fake, recipe, monkeypatch, service, operation, what):
    secret(fake, monkeypatch, "{}")
    fake.forbid(service, operation)
    the_one(recipe, f"{what} could not be checked: these credentials may not do {operation}", "launcher.json", True)


def test_trust_policies_in_their_several_forms():
    def policy(**changes):
        return {"Statement": {"Effect": "Allow", "Action": "sts:AssumeRole", **changes}}

    sagemaker = "sagemaker.amazonaws.com"
    assert trusts(policy(Principal={"Service": ["ec2.amazonaws.com", sagemaker]}), sagemaker)
    assert trusts(policy(Principal="*"), sagemaker)
    assert not trusts(policy(Principal={"AWS": "arn:aws:iam::123456789012:root"}), sagemaker)
    assert not trusts(policy(Principal={"Service": sagemaker}, Effect="Deny"), sagemaker)


def test_the_command(fake, small_llama, fresh_project):
    recipe = fresh_project.folder / "cloud.yaml"
    recipe.write_text(f"extends: {fresh_project.recipe}\n{BLOCK.replace('=', ': ', 1)}\n")
    fresh_project.env |= fake.env()
    good = fresh_project.command("cloud", "preflight", "--config", str(recipe))
    assert (good.code, good.stdout) == (0, ""), good.stderr
    no_trust(fake)
    bad = fresh_project.command("cloud", "preflight", "--config", str(recipe))
    assert bad.code == 2
    assert "- The role training does not let sagemaker.amazonaws.com assume it." in bad.stderr
    # A run makes the same checks first, and then does nothing.
    run = fresh_project.command("run", "sft", "--config", str(recipe))
    assert (run.code, "does not let sagemaker.amazonaws.com" in run.stderr) == (2, True)
    local = fresh_project.command("cloud", "preflight", "--config", str(fresh_project.recipe))
    assert (local.code, "trains on this machine, not on SageMaker" in local.stderr) == (2, True)
