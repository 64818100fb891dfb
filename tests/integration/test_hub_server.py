"""The local Hub serves and takes what the real clients ask and send.

The clients read `HF_ENDPOINT` when they are imported, so each script runs in its own process.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_content import CIFAR10_NAMES, CIFAR100_COARSE_NAMES, add_recipe_repos
from tests.hub_server import HubServer

LOAD_SCRIPT = """
import timm
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

splits = {}
for name in ("uoft-cs/cifar10", "uoft-cs/cifar100"):
    dataset = load_dataset(name)
    image = dataset["train"][3]["img"]
    splits[name] = {
        "rows": {split: len(dataset[split]) for split in dataset},
        "columns": dataset["test"].column_names,
        "names": dataset["train"].features[dataset["train"].column_names[-1]].names,
        "config": dataset["train"].info.config_name,
        "pixels": [image.mode, image.size, sum(image.tobytes())],
    }
models = {}
labels = [str(index) for index in range(10)]
for name in (
    "google/vit-base-patch16-224-in21k",
    "timm/resnet50.a1_in1k",
    "timm/efficientnet_b0.ra_in1k",
):
    model, loading = AutoModelForImageClassification.from_pretrained(
        name,
        num_labels=10,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    processor = AutoImageProcessor.from_pretrained(name)
    inputs = processor(image, return_tensors="pt")
    models[name] = {
        "class": type(model).__name__,
        "new": sorted(
            [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
        ),
        "body": float(next(model.parameters()).detach().double().sum()),
        "pixels": list(inputs["pixel_values"].shape),
        "logits": list(model.eval()(**inputs).logits.shape),
    }
direct = timm.create_model("hf-hub:timm/resnet50.a1_in1k", pretrained=True)
weight = float(next(direct.parameters()).detach().double().sum())
print(json.dumps({"datasets": splits, "models": models, "timm": [direct.num_classes, weight]}))
"""

PUSH_SCRIPT = """
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

folder, repo_id = Path("model"), "tester/pushed"
model = ViTForImageClassification(
    ViTConfig(
        image_size=32,
        hidden_size=256,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=1024,
    )
)
model.save_pretrained(folder)
ModelCard("---\\nlicense: mit\\n---\\n\\n# Pushed\\n").save(folder / "README.md")
api = HfApi()
user = api.whoami()["name"]
for _ in range(2):
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload")
commit = api.model_info(repo_id).sha
loaded = AutoModelForImageClassification.from_pretrained(repo_id)
equal = all(
    torch.equal(ours, theirs)
    for ours, theirs in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
)
api.create_tag(repo_id, tag="v1")
api.upload_file(path_or_fileobj=b"later", path_in_repo="notes/later.txt", repo_id=repo_id)
api.delete_file("README.md", repo_id=repo_id)
model.push_to_hub("tester/transformers", private=True)
snapshot = Path(snapshot_download(repo_id, revision="v1"))
print(json.dumps({
    "user": user,
    "equal": equal,
    "first": commit,
    "tagged": sorted(path.name for path in snapshot.iterdir()),
    "tree": sorted(item.path for item in api.list_repo_tree(repo_id, recursive=True)),
}))
"""

REFUSAL_SCRIPT = """
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

wrong, right, known = HfApi(token="hf_wrong"), HfApi(), "google/vit-base-patch16-224-in21k"
Path("model").mkdir()
Path("model/big.bin").write_bytes(b"x" * 10_000_001)


def outcome(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response.status_code if response is not None else None]
    return ["no error", None]


right.create_repo("tester/refused")
print(json.dumps({
    "whoami": outcome(wrong.whoami),
    "create": outcome(wrong.create_repo, "tester/other"),
    "upload": outcome(wrong.upload_folder, repo_id="tester/refused", folder_path="model"),
    "no token": outcome(HfApi(token=False).create_repo, "tester/other"),
    "not mine": outcome(right.upload_folder, repo_id=known, folder_path="model"),
    "exists": outcome(right.create_repo, "tester/refused"),
    "no repo": outcome(hf_hub_download, "tester/none", "config.json"),
    "no file": outcome(hf_hub_download, known, "none.json"),
    "no revision": outcome(hf_hub_download, known, "config.json", revision="none"),
    "listing": HfFileSystem().ls("datasets/uoft-cs/cifar10/plain_text", detail=False),
}))
"""


def run_client(server: HubServer, home: Path, script: str, **variables: str) -> Any:
    """Run a script against the server with its cache in `home`; return the JSON it prints last."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", "import json\nfrom pathlib import Path\n" + script],
        env=inherited | server.env() | {"HF_HOME": str(home / "hf")} | variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A server with the repositories that the shipped recipes name."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        add_recipe_repos(server, tmp_path_factory.mktemp("content"), train=120, test=100)
        yield server


@pytest.fixture(scope="module")
def load_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the cache that the loading script fills."""
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def loaded(server: HubServer, load_home: Path) -> Any:
    """What the loading script saw online, with an empty cache."""
    return run_client(server, load_home, LOAD_SCRIPT)


@pytest.fixture(scope="module")
def push_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the pushing script works in."""
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def pushed(server: HubServer, push_home: Path) -> Any:
    """What the pushing script saw."""
    return run_client(server, push_home, PUSH_SCRIPT, HF_TOKEN=server.token)


def test_transformers_loads_vit_and_its_processor(loaded: Any) -> None:
    vit = loaded["models"]["google/vit-base-patch16-224-in21k"]
    assert vit["class"] == "ViTForImageClassification"
    assert vit["new"] == ["classifier.bias", "classifier.weight"]
    assert (vit["pixels"], vit["logits"]) == ([1, 3, 224, 224], [1, 10])


@pytest.mark.parametrize(
    ("name", "head"),
    [("timm/resnet50.a1_in1k", "fc"), ("timm/efficientnet_b0.ra_in1k", "classifier")],
)
def test_transformers_loads_timm_repositories(loaded: Any, name: str, head: str) -> None:
    model = loaded["models"][name]
    assert model["class"] == "TimmWrapperForImageClassification"
    assert model["new"] == [f"timm_model.{head}.bias", f"timm_model.{head}.weight"]
    assert (model["pixels"], model["logits"]) == ([1, 3, 224, 224], [1, 10])


def test_timm_itself_loads_the_same_weights(loaded: Any) -> None:
    assert loaded["timm"] == [1000, loaded["models"]["timm/resnet50.a1_in1k"]["body"]]


def test_datasets_loads_both_cifar_repositories(loaded: Any) -> None:
    cifar10, cifar100 = (loaded["datasets"][f"uoft-cs/{name}"] for name in ("cifar10", "cifar100"))
    assert cifar10["rows"] == cifar100["rows"] == {"train": 120, "test": 100}
    assert cifar10["columns"] == ["img", "label"]
    assert cifar100["columns"] == ["img", "fine_label", "coarse_label"]
    assert (cifar10["names"], cifar100["names"]) == (CIFAR10_NAMES, CIFAR100_COARSE_NAMES)
    assert (cifar10["config"], cifar100["config"]) == ("plain_text", "cifar100")
    assert cifar10["pixels"][:2] == ["RGB", [32, 32]]


def test_everything_loads_again_offline_from_the_cache(
    server: HubServer, load_home: Path, loaded: Any
) -> None:
    count = len(server.requests)
    assert run_client(server, load_home, LOAD_SCRIPT, HF_HUB_OFFLINE="1") == loaded
    assert len(server.requests) == count


def test_push_arrives_whole_and_loads_back(server: HubServer, push_home: Path, pushed: Any) -> None:
    local = {path.name: path.read_bytes() for path in (push_home / "model").iterdir()}
    assert len(local["model.safetensors"]) > 10_000_000
    assert set(local) == {"README.md", "config.json", "model.safetensors"}
    files = server.files("tester/pushed", revision=pushed["first"])
    assert files.pop(".gitattributes").startswith(b"*.bin filter=lfs")
    assert files == local
    assert (pushed["user"], pushed["equal"]) == ("tester", True)


def test_push_follows_the_order_of_the_hub(server: HubServer, pushed: Any) -> None:
    calls = [f"{method} {path}" for method, path, _ in server.requests]
    api = "/api/models/tester/pushed"
    order = [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        f"POST {api}/preupload/main",
        "POST /tester/pushed.git/info/lfs/objects/batch",
        "PUT /lfs/objects/",
        f"POST {api}/commit/main",
    ]
    places = [next(i for i, call in enumerate(calls) if call.startswith(step)) for step in order]
    assert places == sorted(places)


def test_unchanged_files_make_no_second_commit(server: HubServer, pushed: Any) -> None:
    assert pushed["tagged"] == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    calls = [(method, path) for method, path, _ in server.requests]
    # One upload of the folder, then one added and one deleted file.
    assert calls.count(("POST", "/api/models/tester/pushed/commit/main")) == 3
    assert sum(method == "PUT" for method, _ in calls) == 1


def test_later_commits_move_main_but_not_the_tag(server: HubServer, pushed: Any) -> None:
    rest = [".gitattributes", "config.json", "model.safetensors"]
    assert pushed["tree"] == [*rest, "notes", "notes/later.txt"]
    assert server.files("tester/pushed")["notes/later.txt"] == b"later"
    assert set(server.files("tester/pushed", revision="v1")) == {*rest, "README.md"}
    assert set(server.files("tester/transformers")) >= set(rest)


def test_clients_see_the_hubs_own_errors(server: HubServer, tmp_path: Path) -> None:
    seen = run_client(server, tmp_path, REFUSAL_SCRIPT, HF_TOKEN=server.token)
    for name in ("whoami", "create", "upload", "no token"):
        assert seen[name] == ["HfHubHTTPError", 401], name
    assert seen["not mine"] == ["HfHubHTTPError", 403]
    assert seen["exists"] == ["HfHubHTTPError", 409]
    assert seen["no repo"] == ["RepositoryNotFoundError", 404]
    assert seen["no file"] == ["RemoteEntryNotFoundError", 404]
    assert seen["no revision"] == ["RevisionNotFoundError", 404]
    assert seen["listing"] == [
        f"datasets/uoft-cs/cifar10/plain_text/{split}-00000-of-00001.parquet"
        for split in ("test", "train")
    ]
    assert set(server.files("tester/refused")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("wanted", "part", "content_range"),
    [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ],
)
def test_range_requests_get_that_part(
    tmp_path: Path, wanted: str, part: bytes, content_range: str
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "digits.bin").write_bytes(b"0123456789")
    with HubServer(tmp_path / "hub") as server:
        server.add_repo("tester/digits", "model", tmp_path / "repo")
        url = f"{server.url}/tester/digits/resolve/main/digits.bin"
        request = urllib.request.Request(url, headers={"Range": wanted})
        with urllib.request.urlopen(request) as response:
            assert (response.status, response.read()) == (206, part)
            assert response.headers["Content-Range"] == content_range
            assert response.headers["X-Linked-Size"] == "10"
        beyond = urllib.request.Request(url, headers={"Range": "bytes=10-"})
        with pytest.raises(urllib.error.HTTPError, match="416") as refusal:
            urllib.request.urlopen(beyond)
        refusal.value.close()
