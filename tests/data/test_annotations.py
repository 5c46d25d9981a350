"""Annotation records and files: what is read, and how each kind of broken file is refused."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from llava_sp.data import record_file
from llava_sp.data.annotations import BadSample, parse_record
from llava_sp.data.record_file import RecordFile

RECORDS = [
    {"id": "a", "image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\nWhät 😀?"}, {"from": "gpt", "value": "A b."}]},
    {"id": "b", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three } ] \" ,"}]},
    {"id": "c", "image": ["x.jpg", "y.jpg"], "conversations": []},
]  # fmt: skip
FORMS = {
    "compact": json.dumps(RECORDS, separators=(",", ":")),
    "indented": json.dumps(RECORDS, indent=1, ensure_ascii=False),
    "windows": json.dumps(RECORDS, indent=1, ensure_ascii=False).replace("\n", "\r\n"),
    "marked": "\ufeff" + json.dumps(RECORDS, ensure_ascii=False),
    "lines": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS),
    "lines_marked": "\ufeff" + "\n".join(json.dumps(record) for record in RECORDS),
    "lines_with_gaps": "\n\n".join(json.dumps(record, ensure_ascii=False) + "\r" for record in RECORDS) + "\n \n",
}


def write(tmp_path, text: str | bytes):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_records(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr(record_file, "BLOCK", block)
    file = RecordFile(write(tmp_path, FORMS[form]), tmp_path)
    assert [file[index] for index in (2, 0, 1)] == [RECORDS[index] for index in (2, 0, 1)]
    assert file.words.tolist() == [5, 7, 0] and file.image_counts.tolist() == [1, 0, 2]
    assert len(file) == 3
    copy = pickle.loads(pickle.dumps(file))
    assert copy[1] == RECORDS[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "data.json holds no records"),
        (" \n", "data.json holds no records"),
        ("[]", "holds no records"),
        ("[ ]\n", "holds no records"),
        (FORMS["compact"][:-40], "line 1, column .*record 2 is cut off"),
        (FORMS["compact"][:-1], "the file is cut off here"),
        (FORMS["indented"][:120], r"data.json, line \d+, column \d+: record 0 is cut off"),
        ('[{"id": 1},\n{"id": }]', r"line 2, column 8: record 1 is not JSON"),
        ('[{"id": 1} {"id": 2}]', r"line 1, column 12: expected ',' or ']', found '\{'"),
        ('[{"id": 1}] more', "line 1, column 13: more text after the end"),
        ('[{"id": 1}, 3]', "data.json, record 1 is 3; expected an object"),
        ('["a"]', "data.json, record 0 is 'a'; expected an object"),
        ('{"a": 1,\n "b": 2}', "data.json, line 1 is not valid JSON"),
        ('{"id": 1}\n{"id": 2\n', "data.json, line 2 is not valid JSON"),
        ('{"id": 1}\n[1]\n', r"data.json, line 2 is \[1\]; expected an object"),
        ("annotations", "data.json, line 1 is not valid JSON"),
        (b'[{"id": "\xff"}]', "is not UTF-8 text"),
        (b'{"id": "\xff"}', "is not UTF-8 text"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        RecordFile(write(tmp_path, text), tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no annotation file .*nothing.json"):
        RecordFile(tmp_path / "nothing.json", tmp_path)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path, FORMS["compact"])
    file = RecordFile(path, tmp_path)
    path.write_text(FORMS["indented"])
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="was changed while it was in use"):
        file[0]


def test_parsed_record():
    first, third = parse_record(RECORDS[0]), RECORDS[2]
    assert (first.id, first.images) == ("a", ["x.jpg"])
    assert [turn["role"] for turn in first.turns] == ["user", "assistant"]
    with pytest.raises(BadSample, match=r"conversations is \[\]; expected a list of .*at least one"):
        parse_record(third)
    assert parse_record({**RECORDS[1], "image": ["p", "q"]}).images == ["p", "q"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conversations": None}, "id 'a': conversations is None"),
        ({"conversations": "hi"}, "conversations is 'hi'"),
        ({"conversations": ["hi"]}, r"conversations\[0\] is 'hi'; expected an object with from, value"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] has no value; it has from"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value is 3; expected text"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            r"conversations\[0\].from is 'bot'; expected 'human' or 'user' or 'gpt'",
        ),
        ({"image": 3}, "image is 3; expected null or a path or a list of a path"),
        ({"image": ["a", None]}, r"image is \['a', None\]; expected"),
        ({"image": ""}, "image is ''; expected"),
        ({"image": "a\ud83d"}, r"image is 'a\\ud83d'; expected null or a path"),
        ({"images": {"bytes": "x"}}, "images is {'bytes': 'x'}; expected null or a path or a list of a path"),
        ({"images": ["other.jpg"]}, r"images is \['other.jpg'\]: media that are not used"),
        ({"image": ["x.jpg", "y\udcff"]}, "image is .* expected"),
        (
            {"conversations": [{"from": "human", "value": "a \udc00 b"}]},
            r"conversations\[0\].value is 'a \\udc00 b'; expected text, without half a surrogate pair",
        ),
        (
            {"conversations": [{"from": "human", "value": "a", "image": "z.jpg"}]},
            r"id 'a': conversations\[0\].image is 'z.jpg': media that are not used",
        ),
    ],
)
def test_bad_records(change, message):
    with pytest.raises(BadSample, match=message):
        parse_record({**RECORDS[0], **change})


MEDIA = {
    "video": "clip.mp4", "videos": ["clip.mp4"], "video_path": "clip.mp4", "audio": {"path": "a.wav"}, "audios": ["a.wav"],
    "image_path": "x.jpg", "imageFile": "x.jpg", "image-url": "http://x/x.jpg", "image_name": "x.jpg", "img": "x.jpg", "Image": "x.jpg",
    "pictures": ["x.jpg"], "frames": ["0.jpg"], "frame_list": ["0.jpg"], "sound": "a.wav", "point_cloud": "p.npy", "depth": "d.png",
    "jpg": "x", "mp4": "x", "media": ["x"],
}  # fmt: skip
# Of the annotation files in the field: LLaVA, ShareGPT4V, ALLaVA, Cambrian, OneVision, LLaVA-Med, InternVL.
METADATA = {
    "id": 7, "model": "gpt-4", "source": "coco/x.jpg", "data_source": "vg", "url": "http://x/x.jpg", "type": "conv", "domain": {"ct": True},
    "image_id": "0001", "image_size": [3, 4], "width": 3, "height": 4, "width_list": [3], "video_id": "v", "depth": 2, "frames": 8,
    "metadata": {"image": "x.jpg"}, "split": "train", "task": "vqa", "score": 0.5, "language": "en", "caption": "a video", "system": None,
    "video": None, "videos": [], "audio": "", "img": {}, "imagenet": "n0", "media_type": "text",
}  # fmt: skip


@pytest.mark.parametrize("key", MEDIA)
def test_media_that_are_not_used_are_refused_by_name(key):
    with pytest.raises(BadSample, match=rf"id 'b': {key} is .*: media that are not used .the key `image` names images"):
        parse_record({**RECORDS[1], key: MEDIA[key]})


@pytest.mark.parametrize("key", METADATA)
def test_metadata_stay_unread(key):
    for record in RECORDS[:2]:
        assert parse_record({**record, key: METADATA[key]}).turns == parse_record(record).turns


def test_where_the_image_is_from_stands_beside_it():
    record = RECORDS[0] | {"image_url": "http://x/x.jpg", "image_path": "/data/x.jpg", "img_name": "x"}
    assert parse_record(record).images == ["x.jpg"]
