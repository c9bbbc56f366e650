"""The checks before a SageMaker job, over HTTP on a fake account: each problem is found and has its remedy."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError

from llm_engineering.cloud.sagemaker import machine_checks
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.cost import cost_sentences, price_of
from llm_engineering.cloud.sagemaker.preflight import check, problems
from llm_engineering.cloud.sagemaker.trust import trusts
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tests.conftest import ROOT
from tests.fakes.iam import policy
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


def test_deepspeed_needs_an_image_that_has_it(fake, small_llama):
    deepspeed = ["compute.num_processes=2", "compute.distributed=deepspeed", "compute.zero_stage=2"]
    recipe = make_recipe(small_llama, *deepspeed)
    the_one(recipe, "does not say that it has DeepSpeed", "make image ARGS=--deepspeed", is_warning=True)


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
        (no_trust, "does not let sagemaker.amazonaws.com assume it", "/aws/job-trust.json"),
        (lambda f: f.denied.add("iam:PassRole"), "user/launcher may not pass the role", "iam:PassRole"),
        (lambda f: f.client("s3").delete_bucket(Bucket=BUCKET), "There is no bucket", f"aws s3 mb s3://{BUCKET}"),
        (lambda f: f.forbid("s3", "PutObject"), "cannot be written to", "s3:PutObject"),
        (no_image, "has no image", "make image"),
        (no_repository, "There is no repository llm-engineering", "make image"),
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
    the_one(typo, "trains on no ml.g5.2xlarg", "ml.g5.2xlarge")


# Known, but not in this region, by moto's copy of EC2's list.
FAR = "compute.sagemaker.instance_type=ml.p6-b300.48xlarge"


def test_a_recipe_is_refused_only_if_none_of_its_types_can_start(fake, small_llama):
    first, second = (f"ml.g5.{size} for spot training job usage" for size in ("2xlarge", "xlarge"))
    request = "request-service-quota-increase --service-code sagemaker --quota-code"
    fake.quotas[first] = 0.0
    the_one(make_recipe(small_llama), f"The quota `{first}` is 0", f"{request} L-00000003", is_warning=True)
    alone = make_recipe(small_llama, "compute.sagemaker.fallback_instance_types=[]")
    the_one(alone, "is 0, but the recipe asks for 1", f"{request} L-00000003 --desired-value 1 --region eu-west-1")
    del fake.quotas[first]
    the_one(alone, f"There is no quota `{first}`", "another region")
    # A type without quota, and one that the region does not have: neither can start.
    fake.quotas |= {first: 4.0, second: 0.0, "ml.p6-b300.48xlarge for spot training job usage": 1.0}
    assert [problem.is_warning for problem in found(make_recipe(small_llama, FAR))] == [False, False]
    fake.quotas[second] = 1.0
    the_one(make_recipe(small_llama, FAR), "eu-west-1 has no ml.p6-b300.48xlarge", "Choose another", is_warning=True)


def test_on_demand_asks_another_quota(fake, small_llama):
    for kind in ("ml.g5.2xlarge", "ml.g5.xlarge"):
        fake.quotas[f"{kind} for spot training job usage"] = 0.0
    assert [problem.is_warning for problem in found(make_recipe(small_llama))] == [False, False]
    assert found(make_recipe(small_llama, "compute.sagemaker.use_spot=false")) == []
    allowed = make_recipe(small_llama, "compute.sagemaker.fallback_on_demand=true")
    assert [problem.is_warning for problem in found(allowed)] == [True, True]


def test_a_warm_pool_has_a_quota_of_its_own_and_a_training_plan_needs_none(fake, small_llama):
    keys = ["compute.sagemaker.fallback_instance_types=[]", "compute.sagemaker.use_spot=false"]
    warm = make_recipe(small_llama, *keys, "compute.sagemaker.keep_alive_s=600")
    fake.quotas["ml.g5.2xlarge for training warm pool usage"] = 0.0
    the_one(warm, "`ml.g5.2xlarge for training warm pool usage` is 0, but the recipe asks for 1", "--quota-code")
    fake.quotas["ml.g5.2xlarge for training warm pool usage"] = 1.0
    assert found(warm) == []
    fake.quotas.clear()
    plan = f"compute.sagemaker.training_plan_arn=arn:aws:sagemaker:eu-west-1:{ACCOUNT}:training-plan/spring"
    assert found(make_recipe(small_llama, *keys, plan)) == []


def test_an_isolated_job_needs_no_network(fake, small_llama, monkeypatch):
    isolated = make_recipe(small_llama, "compute.sagemaker.network_isolation=true")
    the_one(isolated, "network_isolation is true, but the job sends its metrics to Comet", "tracking.comet=offline")
    offline = isolated.tracking.model_copy(update={"comet": "offline"})
    isolated = isolated.model_copy(update={"tracking": offline})
    # Its process reads no secret.
    monkeypatch.setenv("SAGEMAKER_SECRET", "nothing")
    assert found(isolated) == []
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: SimpleNamespace(gated=False, private=False))
    monkeypatch.setattr(machine_checks, "volume_bytes", lambda *a: 0)
    hub = isolated.model_copy(update={"model": isolated.model.model_copy(update={"name_or_path": "owner/model"})})
    the_one(hub, "but the job downloads owner/model from the Hugging Face Hub", "Set compute.sagemaker.weights to s3")
    copied = isolated.compute.sagemaker.model_copy(update={"weights": "s3"})
    assert found(hub.model_copy(update={"compute": hub.compute.model_copy(update={"sagemaker": copied})})) == []


def test_the_jobs_of_the_whole_chain_need_an_image_with_the_steps(fake, small_llama, monkeypatch):
    chain = ["compute.sagemaker.scope=chain"]
    the_one(make_recipe(small_llama, *chain), "scope chain is not set", "set SAGEMAKER_RETRAIN_IMAGE in .env")
    monkeypatch.setenv("SAGEMAKER_RETRAIN_IMAGE", IMAGE.replace(":training", ":retrain"))
    the_one(make_recipe(small_llama, *chain), "has no image", "`make image` pushes it")
    monkeypatch.setenv("SAGEMAKER_RETRAIN_IMAGE", IMAGE)
    assert found(make_recipe(small_llama, *chain)) == []
    general = make_recipe(small_llama, *chain)
    data = general.data.model_copy(update={"replay_instructions": str(ROOT / "README.md"), "instructions": "review"})
    the_one(
        general.model_copy(update={"data": data}),
        "README.md is on this machine, and the job that writes",
        "embedded:general",
    )
    judge = "evaluation.judge={client: openai, model: m, base_url: 'http://localhost:8000/v1'}"
    the_one(
        make_recipe(small_llama, *chain, judge),
        "base_url http://localhost:8000/v1 is on this machine",
        "a job can reach",
    )
    monkeypatch.setenv("OPENAI_API_KEY", "planted")
    remote = judge.replace("http://localhost:8000", "https://example.org")
    the_one(make_recipe(small_llama, *chain, remote), "The job needs OPENAI_API_KEY", "create-secret")


def test_a_quota_that_is_listed_among_the_defaults_only(fake, small_llama):
    recipe = make_recipe(small_llama, "compute.sagemaker.fallback_instance_types=[]")
    name = "ml.g5.2xlarge for spot training job usage"
    del fake.quotas[name]
    fake.default_quotas |= {name: 0.0, "ml.g5.xlarge for spot training job usage": 0.0}
    the_one(recipe, f"The quota `{name}` is 0", "L-00000000")
    fake.default_quotas[name] = 1.0
    assert found(recipe) == []


def test_the_longest_run_has_a_quota(fake, small_llama):
    # No type may run longer, so this is no warning.
    long = make_recipe(small_llama, "compute.sagemaker.max_run_s=864000")
    the_one(
        long,
        "`Longest run time for a training job` is 432000, but the recipe asks for 864000",
        "--desired-value 864000",
    )


def test_a_volume_that_is_too_small(fake, small_llama, monkeypatch):
    fake.quotas["ml.m5.xlarge for spot training job usage"] = 1.0
    volume = ("compute.sagemaker.instance_type=ml.m5.xlarge", "compute.sagemaker.volume_size_gb=10")
    small = make_recipe(small_llama, *volume)
    the_one(small, "volume_size_gb 10 is too small", "Set it to 13 or more")
    # A float32 Llama: 4 bytes for each published weight; 12 · 3 and 4 for each trained weight.
    full = make_recipe(small_llama, "sft.method=full")
    from transformers import AutoModelForCausalLM

    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(small_llama).parameters())
    assert machine_checks.volume_bytes(full, Settings()) == weights * (4 + 36 + 4) + 10 * 2**30


def test_local_disks_take_the_place_of_a_volume(fake, small_llama, monkeypatch):
    """ml.g5.2xlarge has 450 GB of them and ml.g5.xlarge 250 GB."""
    assert found(make_recipe(small_llama, "compute.sagemaker.volume_size_gb=10")) == []
    assert found(make_recipe(small_llama, "compute.sagemaker.volume_size_gb=250")) == []
    large = make_recipe(small_llama, "compute.sagemaker.volume_size_gb=500")
    the_one(large, "ml.g5.2xlarge has 450 GB and ml.g5.xlarge has 250 GB", "Set it to 250, or")
    monkeypatch.setattr(machine_checks, "volume_bytes", lambda *a: 300 * 10**9)
    the_one(make_recipe(small_llama), "ml.g5.xlarge has 250 GB of local disk, but", "a larger disk")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # `max_run_s` is eight hours; the prices are the fake's.
        ("sagemaker_8b", {"ml.g5.2xlarge": (2.0, 16.0), "ml.g6.2xlarge": (3.0, 24.0), "ml.g5.4xlarge": (4.0, 32.0)}),
        ("cuda_8b", {"ml.g5.xlarge": (1.0, 24.0)}),
        ("python_reference", {"ml.g5.xlarge": (1.0, 24.0)}),
    ],
)
def test_the_cost_of_shipped_recipes_before_the_start(fake, recipe, expected):
    fake.prices |= {"ml.g6.2xlarge": 3.0, "ml.g5.4xlarge": 4.0}
    block = (
        [] if recipe == "sagemaker_8b" else ["compute={target: sagemaker, sagemaker: {instance_type: ml.g5.xlarge}}"]
    )
    config = load_recipe(ROOT / "configs" / f"{recipe}.yaml", block).compute.sagemaker
    lines = list(cost_sentences(config, Account.resolve(config, Settings())))
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert lines == [
        f"A job on 1 x {kind} costs about {hourly:.2f} USD an hour on demand in eu-west-1 (price list of {today}), and at most "
        f"{whole:.2f} USD (compute.sagemaker.max_run_s)"
        for kind, (hourly, whole) in expected.items()
    ]
    asked = {request.region for request in fake.requests if request.service == "pricing"}
    assert asked == {"us-east-1"}


def test_without_a_price_the_line_says_so(fake, recipe, caplog):
    account = Account.resolve(recipe.compute.sagemaker, Settings())
    fake.forbid("pricing", "GetProducts")
    assert price_of("ml.g5.xlarge", account) is None
    assert "AWS's price list cannot be read" in caplog.text
    fake.errors.clear()
    fake.prices.clear()
    assert (
        list(cost_sentences(recipe.compute.sagemaker, account))[1] == "The cost of a job on ml.g5.xlarge is not known"
    )
    assert "has no price for training on ml.g5.xlarge in eu-west-1" in caplog.text
    plan = {"use_spot": False, "training_plan_arn": f"arn:aws:sagemaker:eu-west-1:{ACCOUNT}:training-plan/spring"}
    planned = recipe.compute.sagemaker.model_copy(update=plan)
    assert list(cost_sentences(planned, account)) == ["The machines of the jobs are paid with the training plan"]


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
    monkeypatch.setattr(machine_checks, "volume_bytes", lambda *a: 0)
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
    disk = "compute.sagemaker.volume_size_gb=500"
    recipe = make_recipe(small_llama, disk, "compute.sagemaker.fallback_instance_types=[]")
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
        ("iam", "SimulatePrincipalPolicy", "What you and the role may do"),
        ("s3", "HeadBucket", f"The bucket {BUCKET}"),
        ("ecr", "DescribeImages", f"The image {IMAGE}"),
        ("ec2", "DescribeInstanceTypeOfferings", "The instance types in eu-west-1"),
        ("ec2", "DescribeInstanceTypes", "The disk space of the instance types"),
        ("servicequotas", "ListServiceQuotas", "The service quota"),
        ("secretsmanager", "GetSecretValue", "The secret"),
    ],
)
def test_a_check_that_is_forbidden_is_a_warning(fake, recipe, monkeypatch, service, operation, what):
    secret(fake, monkeypatch, "{}")
    fake.forbid(service, operation)
    the_one(recipe, f"{what} could not be checked: these credentials may not do {operation}", "launcher.json", True)


TRUSTED = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "sagemaker.amazonaws.com"}}
JOB = f"arn:aws:sagemaker:eu-west-1:{ACCOUNT}:training-job/tiny-sft-000000000000-0001"


def trusted(**changes):
    return trusts({"Statement": {**TRUSTED, **changes}}, "sagemaker.amazonaws.com", JOB)


def test_trust_policies_in_their_several_forms():
    sagemaker = "sagemaker.amazonaws.com"
    assert trusted(Principal={"Service": ["ec2.amazonaws.com", sagemaker]})
    assert trusted(Principal="*")
    assert not trusted(Principal={"AWS": "arn:aws:iam::123456789012:root"})
    assert not trusted(Effect="Deny")
    assert trusted(Action="sts:*")
    assert trusted(Action=["sts:TagSession", "sts:Assume*"])
    assert not trusted(Action="sts:AssumeRoleWithWebIdentity")
    deny = {"Effect": "Deny", "Action": "*", "Principal": "*"}
    assert not trusts({"Statement": [TRUSTED, deny]}, sagemaker, JOB)


@pytest.mark.parametrize(
    ("condition", "answer"),
    [
        ({"StringEquals": {"aws:SourceAccount": ACCOUNT}}, True),
        ({"StringEquals": {"AWS:sourceaccount": ["111122223333", ACCOUNT]}}, True),
        ({"StringEquals": {"aws:SourceAccount": "<ACCOUNT>"}}, False),
        ({"StringNotEquals": {"aws:SourceAccount": ACCOUNT}}, False),
        ({"ArnLike": {"aws:SourceArn": f"arn:aws:sagemaker:*:{ACCOUNT}:*"}}, True),
        ({"ArnLike": {"aws:SourceArn": "arn:aws:sagemaker:us-east-1:*:*"}}, False),
        ({"StringLike": {"aws:SourceArn": f"*:{ACCOUNT}:training-job/*"}}, True),
        ({"StringEquals": {"sts:ExternalId": "x"}}, False),
        ({"StringEqualsIfExists": {"sts:ExternalId": "x"}}, True),
        ({"StringEquals": {"aws:SourceOrgID": "o-1"}}, None),
        ({"StringEquals": {"aws:SourceAccount": "1", "aws:SourceOrgID": "o-1"}}, False),
    ],
)
def test_the_conditions_of_a_trust_policy_count(condition, answer):
    assert trusted(Condition=condition) is answer


def test_a_trust_policy_with_its_placeholders_is_refused_and_the_remedy_names_a_filled_one(fake, recipe):
    """The policies of docs/aws, put into the account as they are, or as the remedies name them."""

    def trust(text: str) -> None:
        fake.client("iam").update_assume_role_policy(RoleName="training", PolicyDocument=text)

    trust((ROOT / "docs" / "aws" / "job-trust.json").read_text())
    (problem,) = found(recipe)
    file = Path(problem.remedy.partition("file://")[2].rstrip("`"))
    assert file.parent == Settings().llm_output_dir / "aws"
    trust(file.read_text())
    assert found(recipe) == []
    # Whether the account is in an organisation is not known here.
    condition = {"StringEquals": {"aws:SourceOrgID": "o-1"}}
    trust(json.dumps({"Version": "2012-10-17", "Statement": [TRUSTED | {"Condition": condition}]}))
    the_one(recipe, "depends on its conditions", "job-trust.json", is_warning=True)


def test_the_rights_of_the_role_are_checked_and_its_policy_is_enough(fake, small_llama, monkeypatch):
    secret(fake, monkeypatch, '{"HF_TOKEN": "planted"}')
    vpc = "compute.sagemaker.vpc={subnets: [subnet-1], security_group_ids: [sg-1]}"
    recipe = make_recipe(small_llama, vpc)
    fake.rights = [*policy("job"), *policy("job-vpc")]
    assert found(recipe) == []
    fake.rights = []
    missing = found(recipe)
    said = "\n".join(map(str, missing))
    for action in ("s3:ListBucket", "s3:GetObject", "logs:PutLogEvents", "ecr:BatchGetImage", "secretsmanager:GetSecretValue",
                   "ec2:CreateNetworkInterface"):  # fmt: skip
        assert action in said
    assert [problem.what for problem in missing if problem.is_warning] == [
        f"The role training may not do s3:DeleteObject on arn:aws:s3:::{BUCKET}/llm-engineering/checkpoints/job/file"
    ]
    # The commands of the remedies, as they are, repair the role.
    for file in {problem.remedy.partition("file://")[2].rstrip("`") for problem in missing}:
        fake.rights += json.loads(Path(file).read_text())["Statement"]
    assert found(recipe) == []


def test_the_keys_of_the_secret_and_of_the_uploads_are_checked(fake, recipe, monkeypatch):
    kms = fake.client("kms")
    key = kms.create_key()["KeyMetadata"]
    fake.client("secretsmanager").create_secret(Name="llm", SecretString="{}", KmsKeyId=key["KeyId"])
    monkeypatch.setenv("SAGEMAKER_SECRET", "llm")
    fake.rights = [*policy("job"), *policy("secret-kms", SECRET_KMS_KEY_ARN=key["Arn"])]
    assert found(recipe) == []
    fake.rights = policy("job")
    the_one(recipe, "may not do kms:Decrypt with the key of the secret llm", key["Arn"], is_warning=True)
    fake.rights = None
    kms.disable_key(KeyId=key["KeyId"])
    the_one(recipe, "of the secret llm is Disabled", "aws kms enable-key")
    monkeypatch.delenv("SAGEMAKER_SECRET")
    cloud = recipe.compute.sagemaker.model_copy(update={"kms_key": "alias/nothing"})
    compute = recipe.compute.model_copy(update={"sagemaker": cloud})
    fake.client("s3").get_bucket_location(Bucket=BUCKET)
    missing = [problem.what for problem in found(recipe.model_copy(update={"compute": compute}))]
    assert "There is no key alias/nothing, which compute.sagemaker.kms_key names" in missing


def test_the_command(fake, small_llama, fresh_project):
    recipe = fresh_project.folder / "cloud.yaml"
    recipe.write_text(f"extends: {fresh_project.recipe}\n{BLOCK.replace('=', ': ', 1)}\n")
    fresh_project.env |= fake.env()
    good = fresh_project.command("cloud", "preflight", "--config", str(recipe))
    assert (good.code, good.stdout) == (0, ""), good.stderr
    assert "A job on 1 x ml.g5.2xlarge costs about 2.00 USD an hour on demand in eu-west-1" in good.stderr
    no_trust(fake)
    bad = fresh_project.command("cloud", "preflight", "--config", str(recipe))
    assert bad.code == 2
    assert "- The role training does not let sagemaker.amazonaws.com assume it." in bad.stderr
    # A run makes the same checks first, and then does nothing.
    run = fresh_project.command("run", "sft", "--config", str(recipe))
    assert (run.code, "does not let sagemaker.amazonaws.com" in run.stderr) == (2, True)
    local = fresh_project.command("cloud", "preflight", "--config", str(fresh_project.recipe))
    assert (local.code, "trains on this machine, not on SageMaker" in local.stderr) == (2, True)
