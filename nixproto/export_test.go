package nixproto

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto/nar"
)

// smallNar is the archive of an empty file.
func smallNar(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	if err := errors.Join(w.File("", false, 0), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func exportStream(t testing.TB, infos ...PathInfo) []byte {
	t.Helper()
	archive := smallNar(t)
	return encoded(t, func(w *Writer) error {
		for _, p := range infos {
			err := WriteExportNext(w)
			_, errNar := w.Write(archive)
			if err := errors.Join(err, errNar, WriteExportInfo(w, &p)); err != nil {
				return err
			}
		}
		return WriteExportEnd(w)
	})
}

// readExport reads a whole export stream.
func readExport(r *Reader) (infos []PathInfo, err error) {
	for {
		if more, err := ReadExportNext(r); err != nil || !more {
			return infos, err
		}
		if err := copyNar(r, NewWriter(io.Discard)); err != nil {
			return infos, err
		}
		p, err := ReadExportInfo(r)
		if err != nil {
			return infos, err
		}
		infos = append(infos, *p)
	}
}

func TestExport(t *testing.T) {
	want := []PathInfo{{Path: pathA}, {Path: pathB, References: []StorePath{pathA, pathB}, Deriver: pathD}}
	b := exportStream(t, want...)
	got, err := readExport(NewReader(bytes.NewReader(b)))
	if d := cmp.Diff(want, got, exportAll); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	for n := range b {
		if _, err := readExport(NewReader(bytes.NewReader(b[:n]))); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
}

// TestExportSignature reads the signature of old exports and drops it.
func TestExportSignature(t *testing.T) {
	b := encoded(t, func(w *Writer) error {
		w.Uint64(exportMagic)
		w.Path(pathA)
		w.Paths(nil)
		w.Path("")
		w.Uint64(1)
		w.Str("signature")
		return nil
	})
	r := NewReader(bytes.NewReader(b))
	if p, err := ReadExportInfo(r); err != nil || p.Path != pathA || r.Await() != io.EOF {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestExportMalformed(t *testing.T) {
	if _, err := ReadExportNext(NewReader(bytes.NewReader(numbers(2)))); !errors.Is(err, ErrMalformed) {
		t.Errorf("mark 2: %v", err)
	}
	if _, err := ReadExportInfo(NewReader(bytes.NewReader(numbers(1, 0, 0, 0, 0)))); !errors.Is(err, ErrMalformed) {
		t.Errorf("wrong mark: %v", err)
	}
}
