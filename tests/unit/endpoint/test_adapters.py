"""Adapters at the endpoint: loaded, asked for by name, listed with a parent, unloaded; what is refused."""

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from galley.endpoint.admin import Admin
from galley.endpoint.app import build_app
from galley.errors import AdapterRefused, BadModelFile
from galley.model.adapter import Adapter
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.providers.adapters import Adapters
from galley.providers.fleet import Fleet
from galley.providers.opened import EngineOptions, Opened
from galley.providers.resident import Resident
from tests.lora import gguf_lora, peft, write_safetensors
from tests.tiny import tiny_gguf
from tests.unit.endpoint.conftest import Desk

KEY = {"x-galley-admin-key": "secret"}


class Shop(Desk):
    """A server with one real model, an admin key, and a folder from which adapters may be loaded."""

    def __init__(self, path: Path, folder: Path) -> None:
        options = EngineOptions(backend="reference", kv_memory=8 << 20, lora_dirs=(folder,), max_lora_rank=16)
        self.opened = Opened(tiny_gguf(path / "base.gguf", "llama"), "base", options)
        fleet = Fleet(sizes=lambda _: 0)
        resident = Resident(self.opened.provider.cards[0], lambda *_: self.opened, fleet, opened=self.opened)
        fleet.add(resident)
        super().__init__(path, resident)  # type: ignore[arg-type]
        admin = Admin(fleet, key="secret", load=lambda _: resident, unload=None, router=self.router)  # type: ignore[arg-type]
        self.app = build_app(self.router, self.store, state=self.state, admin=admin)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1")

    async def load(self, name: str, path: Path, **more):
        body = {"lora_name": name, "lora_path": str(path), **more}
        return await self.http.post("/v1/load_lora_adapter", json=body, headers=KEY)

    async def unload(self, name: str):
        return await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=KEY)

    async def says(self, model: str, **more) -> str:
        body = {"model": model, "prompt": "one two three", "max_tokens": 12, "temperature": 0, **more}
        answer = await self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    with GGUF.open(tiny_gguf(tmp_path_factory.mktemp("spec") / "m.gguf", "llama")) as gguf:
        return spec_from_gguf(gguf)


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    made = Shop(tmp_path, folder)
    made.folder = folder  # type: ignore[attr-defined]
    yield made
    made.opened.close()
    made.store.close()
    made.state.close()


async def test_lra1_an_adapter_is_a_model_with_a_parent_and_answers_beside_the_base(shop, spec):
    base = await shop.says("base")
    for name, seed in (("poet", 1), ("clerk", 2)):
        answer = await shop.load(name, peft(shop.folder / name, spec, seed=seed, half=name == "clerk"))
        assert answer.status_code == 200 and name in answer.text
    listed = {one["id"]: one for one in (await shop.http.get("/v1/models")).json()["data"]}
    assert listed["poet"]["parent"] == "base" and listed["base"]["parent"] is None
    poet, clerk = await shop.says("poet"), await shop.says("clerk")
    assert len({base, poet, clerk}) == 3
    together = await asyncio.gather(*(shop.says(name) for name in ("poet", "base", "clerk", "poet")))
    assert together == [poet, base, clerk, poet]
    one = {"model": "poet", "input": "a text"}
    vectors = [
        (await shop.http.post("/v1/embeddings", json=one | {"model": name})).json()["data"][0]["embedding"]
        for name in ("poet", "base")
    ]
    assert not np.allclose(*vectors)


async def test_lra3_unload_waits_for_what_is_in_hand_and_lets_nothing_new_in(shop, spec):
    await shop.load("poet", peft(shop.folder / "poet", spec))
    long = asyncio.create_task(shop.says("poet", max_tokens=150, ignore_eos=True))
    adapters = shop.opened.provider.adapters
    while not adapters.users("poet"):
        await asyncio.sleep(0.001)
    leaving = asyncio.create_task(shop.unload("poet"))
    await asyncio.sleep(0.02)
    assert not leaving.done() and not long.done()
    late = await shop.http.post("/v1/completions", json={"model": "poet", "prompt": "x"})
    assert (late.status_code, late.json()["error"]["code"]) == (404, "model_not_found")
    assert len(await long) > 0
    assert (await leaving).status_code == 200
    assert [one["id"] for one in (await shop.http.get("/v1/models")).json()["data"]] == ["base"]
    await shop.says("base")
    residency = shop.opened.engine.scheduler.residency
    assert len(residency) == 0 and not residency.held, "its memory is given back"
    assert (await shop.unload("poet")).status_code == 404
    assert (await shop.load("poet", shop.folder / "poet")).status_code == 200
    await shop.says("poet")


async def test_lra6_adapters_come_from_allowed_folders_alone(shop, spec, tmp_path):
    outside = peft(tmp_path / "outside", spec)
    (shop.folder / "link").symlink_to(outside)
    inside = peft(shop.folder / "inside", spec)
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    places = (outside, shop.folder / ".." / "outside", shop.folder / "link", inside, Path("/etc"), Path("x"))
    for place in places:
        refused = await shop.load("poet", place)
        assert refused.status_code == 403, place
    body = {"lora_name": "poet", "lora_path": str(inside)}
    assert (await shop.http.post("/v1/load_lora_adapter", json=body)).status_code == 401, "no admin key"
    with pytest.raises(Exception, match="not in a folder"):
        Adapters().check_path(inside)


async def test_names_that_are_taken_and_bodies_that_are_wrong(shop, spec):
    good = peft(shop.folder / "good", spec)
    assert (await shop.load("good", good)).status_code == 200
    for name, path, code in (
        ("base", good, "name_taken"),
        ("good", good, "name_taken"),
        ("none", shop.folder / "none", "unsupported_adapter"),
        ("deep", peft(shop.folder / "deep", spec, rank=17), "unsupported_adapter"),
    ):
        refused = await shop.load(name, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code), name
    refused = await shop.load("more", good, wishes=1)
    assert refused.json()["error"]["param"] == "wishes"


def test_lra4_peft_and_gguf_files_of_one_adapter_are_the_same(spec, tmp_path):
    for scale in (8, 3):
        one = Adapter.open(peft(tmp_path / f"p{scale}", spec, alpha=scale), "a", spec, max_rank=8)
        two = Adapter.open(gguf_lora(tmp_path / f"g{scale}.gguf", spec, alpha=scale), "a", spec, max_rank=8)
        assert one.pairs.keys() == two.pairs.keys() and one.digest != two.digest
        for name, (a, b) in one.pairs.items():
            assert np.array_equal(a, two.pairs[name][0])
            assert np.allclose(b, two.pairs[name][1], atol=1e-7)


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"lora_bias": True}, "lora_bias"),
    ({"rank": 9}, "rank 9 is above"),
]


@pytest.mark.parametrize(("config", "word"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_not_done_here_is_refused_by_name(spec, tmp_path, config, word):
    with pytest.raises(AdapterRefused, match=word):
        Adapter.open(peft(tmp_path / "a", spec, **config), "a", spec, max_rank=8)


def test_tensors_that_do_not_belong_are_refused(spec, tmp_path):
    folder = peft(tmp_path / "a", spec)
    place = folder / "adapter_model.safetensors"
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = np.ones((4, spec.hidden), np.float32), np.ones((spec.q_rows, 4), np.float32)
    for tensors, word in (
        ({"base_model.model.lm_head.lora_A.weight": a}, "lm_head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": a}, "embed_tokens"),
        ({stem + "magnitude_vector": a}, "magnitude"),
        ({stem + "A.weight": a}, "one half"),
        ({stem + "A.weight": a, stem + "B.weight": b[:5]}, "do not fit"),
        ({stem.replace("layers.0", "layers.7") + "A.weight": a}, "layers"),
        ({stem + "A.weight": a * np.nan, stem + "B.weight": b}, "not finite"),
        ({}, "no tensors"),
    ):
        write_safetensors(place, tensors)
        with pytest.raises(AdapterRefused, match=word):
            Adapter.open(folder, "a", spec, max_rank=8)


def test_damaged_files_are_told_from_unsupported_ones(spec, tmp_path):
    folder = peft(tmp_path / "a", spec)
    place = folder / "adapter_model.safetensors"
    whole = place.read_bytes()
    for data in (b"", whole[:100], whole[:-10], b"\xff" * 64, (8).to_bytes(8, "little") + b"[1, 2, 3"):
        place.write_bytes(data)
        with pytest.raises(BadModelFile):
            Adapter.open(folder, "a", spec, max_rank=8)
    place.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BadModelFile, match="JSON"):
        Adapter.open(folder, "a", spec, max_rank=8)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": -1}))
    with pytest.raises(BadModelFile, match="lora_alpha"):
        Adapter.open(folder, "a", spec, max_rank=8)
    with pytest.raises(AdapterRefused, match="not a LoRA adapter"):
        Adapter.open(gguf_lora(tmp_path / "m.gguf", spec, kind="model"), "a", spec, max_rank=8)
