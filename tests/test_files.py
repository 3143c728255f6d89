"""Files that are always whole, and marked sections of Markdown files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kw_timm.files import check_writable, new_file, replace_section

FILES = Path(__file__).parents[1] / 'kw_timm/files.py'


def test_a_new_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / 'picture.svg'
    with new_file(file) as filling:
        filling.write_text('half')
        assert not file.exists()
        assert filling.suffix == '.svg'
        filling.write_text('whole')
    assert file.read_text() == 'whole'
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_a_block_that_fails_changes_nothing(error, tmp_path):
    file = tmp_path / 'file'
    file.write_text('old')

    def fill():
        with new_file(file) as filling:
            filling.write_text('half')
            raise error

    with pytest.raises(error):
        fill()
    assert file.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_permissions_stay(tmp_path):
    (tmp_path / 'folder').mkdir()
    file, link = tmp_path / 'folder/file', tmp_path / 'link'
    file.write_text('old')
    file.chmod(0o640)
    link.symlink_to(file)
    with new_file(link) as filling:
        filling.write_text('new')
    assert link.is_symlink()
    assert file.read_text() == 'new'
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / 'file')
    with pytest.raises(ValueError, match='is a folder'):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"no folder '.*missing'"):
        check_writable(tmp_path / 'missing/file')
    monkeypatch.setattr(os, 'access', lambda *_: False)  # The superuser may write anywhere.
    with pytest.raises(ValueError, match='cannot be written'):
        check_writable(tmp_path / 'file')


def test_sections_are_replaced_and_the_rest_stays(tmp_path):
    file = tmp_path / 'notes.md'
    file.write_text('a\n<1>old\n</1>\nb\n<2>\n</2>c')
    new = replace_section(file, ('<1>', '</1>', 'x'), ('<2>', '</2>', 'y\nz'))
    assert new == 'a\n<1>\nx\n</1>\nb\n<2>\ny\nz\n</2>c'
    assert file.read_text().startswith('a\n<1>old')
    file.write_text(new)
    assert replace_section(file, ('<1>', '</1>', 'x')) == new


@pytest.mark.parametrize('text', ['', '<1>', '</1><1>'])
def test_missing_marks_are_named(text, tmp_path):
    file = tmp_path / 'notes.md'
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"'{file}': it has no line '<1>'")):
        replace_section(file, ('<1>', '</1>', 'x'))


def test_unreadable_texts_are_named(tmp_path):
    with pytest.raises(ValueError, match='cannot be read'):
        replace_section(tmp_path / 'missing.md', ('<1>', '</1>', ''))
    (tmp_path / 'binary.md').write_bytes(b'\xff\xfe\xfa')
    with pytest.raises(ValueError, match='cannot be read'):
        replace_section(tmp_path / 'binary.md', ('<1>', '</1>', ''))


def test_the_standard_library_suffices():
    code = f'import runpy, sys; runpy.run_path({str(FILES)!r}); assert not {{"torch", "timm"}} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
