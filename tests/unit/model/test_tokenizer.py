"""Text to ids and back, against llama.cpp's ids and against its own promises."""

import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.errors import BadModelFile, InvalidRequest
from galley.model.gguf import GGUF
from galley.model.tokenizer import Tokenizer

from .tinyfile import SPECIALS, byte_letters, write

GOLDEN = Path(__file__).parents[2] / "data" / "smollm2_ids.json"
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def tiny(path: Path, **options: Any) -> Tokenizer:
    with GGUF.open(write(path / "m.gguf", **options)) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    with GGUF.open(smollm2_path) as file:
        return Tokenizer.from_gguf(file)


@pytest.mark.model
def test_golden_ids_equal_llama_cpp(smollm2: Tokenizer) -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) >= 300
    for text, plain, parsed in cases:
        assert smollm2.encode(text) == plain, text
        assert smollm2.encode(text, special=True) == parsed, text
        assert smollm2.decode(plain) == text
        assert smollm2.decode(parsed, skip_special=False) == text


@pytest.mark.model
def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152 and smollm2.bos_id == 1 and not smollm2.add_bos
    assert 2 in smollm2.eos_ids and 0 in smollm2.eos_ids
    # This vocabulary has no token for the byte 0x04: saying so beats dropping the character.
    with pytest.raises(InvalidRequest, match="U\\+0004"):
        smollm2.encode("a\x04b")


def test_user_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>\n<|im_start|>system"
    plain = tokenizer.encode(text)
    assert not any(tokenizer.is_special(i) for i in plain) and tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, special=True)
    assert [i for i in parsed if tokenizer.is_special(i)] == [2, 1]
    assert tokenizer.decode(parsed) == "a\nsystem" and tokenizer.decode(parsed, skip_special=False) == text


@given(st.lists(st.one_of(CHARACTERS, st.sampled_from([*SPECIALS, "<|im_", "end|>", "<", "|>"])), max_size=8))
@settings(max_examples=200, deadline=None)
def test_round_trip_without_control_ids(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert not any(tokenizer.is_special(i) for i in ids)
    parsed = tokenizer.encode(text, special=True)
    assert tokenizer.decode(parsed, skip_special=False) == text
    assert sum(map(tokenizer.is_special, parsed)) == sum(isinstance(s, int) for s in tokenizer.segments(text))


def test_user_defined_tokens_are_read_from_plain_text_longest_first(tmp_path: Path) -> None:
    tokens = [*SPECIALS, *byte_letters(), "<think>", "<think>>", "he"]
    types = [3] * 3 + [1] * 256 + [4, 4, 1]
    tokenizer = tiny(tmp_path, tokens=tokens, types=types, merges=["h e"])
    ids = tokenizer.encode("<think>>a<think>")
    assert ids[0] == 260 and ids[-1] == 259 and not tokenizer.is_special(259)
    assert tokenizer.decode(ids) == "<think>>a<think>"


def test_turn_ends_typed_as_normal_tokens_are_made_control(tmp_path: Path) -> None:
    """Old converters marked ``<|im_end|>`` as normal or user-defined; then a user could end a turn."""
    types = [3, 3, 4] + [1] * 257
    tokenizer = tiny(tmp_path, tokens=[*SPECIALS, *byte_letters(), "he"], types=types, merges=["h e"])
    assert tokenizer.is_special(2) and 2 in tokenizer.eos_ids
    assert 2 not in tokenizer.encode("<|im_end|>")


def test_lone_surrogates_and_unknown_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="character 1"):
        tokenizer.encode("a\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidRequest):
            tokenizer.decode([bad])
    with pytest.raises(InvalidRequest, match="bos"):
        tokenizer.encode("a", add_bos=True)


def test_digest_covers_what_decides_the_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tiny(tmp_path).digest == tokenizer.digest and len(tokenizer.digest) == 64
    others = [
        tiny(tmp_path, pre="qwen2"),
        tiny(tmp_path, merges=["l l", "h e"]),
        tiny(tmp_path, types=[3] * 3 + [1] * 257 + [4]),
    ]
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 4


def test_threads_share_one_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"hello {i} <|im_end|> ünï " * 50 for i in range(8)]
    want = [tokenizer.encode(text, special=True) for text in texts]
    got: list[list[int]] = [[]] * 8

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = tokenizer.encode(texts[i], special=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pre-tokeniser": ({"pre": "mystery"}, "tokenizer.ggml.pre"),
    "merge of one part": ({"merges": ["he"]}, "tokenizer.ggml.merges"),
    "merge of unknown tokens": ({"merges": ["qq zz"]}, "tokenizer.ggml.merges"),
    "eot outside": ({"keys": {"tokenizer.ggml.eot_token_id": 9999}}, "tokenizer.ggml.eot_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_vocabularies_name_the_key(case: str, tmp_path: Path) -> None:
    options, key = REFUSED[case]
    with pytest.raises(BadModelFile) as caught:
        tiny(tmp_path, **options)
    assert caught.value.field == f"metadata[{key}]"


def sentencepiece(path: Path, *, missing_byte: bool = False) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "h",
        "i",
        "hi",
        "▁hi",
        "▁h",
        "s",
        "<",
        ">",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * 9]
    scores = [0.0] * 259 + [-5.0, -6.0, -7.0, -2.0, -1.0, -3.0, -8.0, -9.0, -10.0]
    if missing_byte:
        types[10], tokens[10] = 1, "odd"
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_scores_bytes_and_space_prefix(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUF.open(sentencepiece(tmp_path / "s.gguf")))
    name = {tokenizer.token_str(i): i for i in range(tokenizer.vocab_size)}
    assert tokenizer.add_bos and tokenizer.bos_id == 1 and tokenizer.eos_ids == (2,)
    assert tokenizer.encode("hi") == [1, name["▁hi"]]
    assert tokenizer.encode("hi", add_bos=False) == [name["▁hi"]]
    # As llama.cpp does: a space before text that follows a special token.
    assert tokenizer.encode("hi</s>hi", special=True, add_bos=False) == [name["▁hi"], 2, name["▁hi"]]
    spelled = tokenizer.encode("é", add_bos=False)
    assert spelled == [name["▁"], name["<0xC3>"], name["<0xA9>"]]
    assert tokenizer.decode(spelled) == " é" and tokenizer.decode(spelled, start=True) == "é"
    assert not {0, 1, 2} & set(tokenizer.encode("<s></s><0x0A>", add_bos=False))
    with pytest.raises(BadModelFile, match="byte 7 has no token"):
        Tokenizer.from_gguf(GGUF.open(sentencepiece(tmp_path / "t.gguf", missing_byte=True)))


def test_tokenizer_json_gives_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    letters = byte_letters()
    vocab = {text: i for i, text in enumerate([*SPECIALS, *letters, "he", "ll"]) if i > 2}
    added = [
        {"id": i, "content": text, "special": True, "normalized": False} for i, text in enumerate(SPECIALS)
    ]
    source = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        "post_processor": None, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l l"]},
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(source))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    other = Tokenizer.from_json(path)
    assert other.eos_ids == tokenizer.eos_ids and other.vocab_size == tokenizer.vocab_size
    for text in ("hello  world", "a<|im_end|>b", "<|im_start|>user\nhé 12'll"):
        for special in (False, True):
            assert other.encode(text, special=special) == tokenizer.encode(text, special=special)
    path.write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(BadModelFile, match="Unigram"):
        Tokenizer.from_json(path)


def test_long_prompts_are_encoded_whole(tokenizer: Tokenizer) -> None:
    text = "hello world " * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text and sys.getsizeof(text) > 200_000


def test_a_large_text_encodes_alike_and_lets_other_threads_run(smollm2: Tokenizer) -> None:
    line = "The quick brown fox über 😀 the lazy dog.\n"
    text = line * 20_000
    seen, stop = [time.perf_counter()], threading.Event()

    def beat() -> None:
        while not stop.wait(0.002):
            seen.append(time.perf_counter())

    beating = threading.Thread(target=beat)
    beating.start()
    began = time.perf_counter()
    ids = smollm2.encode(text)
    took = time.perf_counter() - began
    stop.set()
    beating.join()
    assert smollm2.decode(ids) == text
    assert ids == smollm2.encode(line) * 20_000  # a line break ends a word here
    # Holding the interpreter's lock would be one gap as long as the encoding.
    assert max(b - a for a, b in itertools.pairwise(seen)) < max(0.7 * took, 0.05)
