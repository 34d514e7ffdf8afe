package nar

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestWriterMisuse(t *testing.T) {
	deep := func(w *Writer) error {
		if err := w.Directory(""); err != nil {
			return err
		}
		for range MaxDepth {
			if err := w.Directory("d"); err != nil {
				return err
			}
		}
		return nil
	}
	for name, write := range map[string]func(w *Writer) error{
		"nothing":      func(w *Writer) error { return w.Close() },
		"root's name":  func(w *Writer) error { return w.Directory("x") },
		"not ended":    func(w *Writer) error { w.Directory(""); return w.Close() },
		"ended twice":  func(w *Writer) error { w.Directory(""); w.EndDirectory(); return w.EndDirectory() },
		"two roots":    func(w *Writer) error { w.Symlink("", "x"); return w.Symlink("", "x") },
		"order":        func(w *Writer) error { w.Directory(""); w.Symlink("b", "x"); return w.Symlink("a", "x") },
		"same name":    func(w *Writer) error { w.Directory(""); w.Symlink("a", "x"); return w.File("a", false, 0) },
		"bad name":     func(w *Writer) error { w.Directory(""); return w.Directory("..") },
		"no name":      func(w *Writer) error { w.Directory(""); return w.File("", false, 0) },
		"empty target": func(w *Writer) error { return w.Symlink("", "") },
		"long target":  func(w *Writer) error { return w.Symlink("", strings.Repeat("x", MaxTargetLen+1)) },
		"negative":     func(w *Writer) error { return w.File("", false, -1) },
		"no file":      func(w *Writer) error { _, err := w.Write([]byte("x")); return err },
		"too much": func(w *Writer) error {
			w.File("", false, 1)
			_, err := w.Write([]byte("xy"))
			return err
		},
		"too little": func(w *Writer) error { w.File("", false, 1); return w.Close() },
		"too little in directory": func(w *Writer) error {
			w.Directory("")
			w.File("a", false, 1)
			return w.EndDirectory()
		},
		"too deep": func(w *Writer) error {
			if err := deep(w); err != nil {
				return nil
			}
			return w.Symlink("l", "x")
		},
	} {
		w := NewWriter(io.Discard)
		if err := write(w); !errors.Is(err, ErrMisuse) {
			t.Errorf("%s: %v", name, err)
		}
		if err := w.Close(); !errors.Is(err, ErrMisuse) {
			t.Errorf("%s: Close after it: %v", name, err)
		}
	}
}

func TestWriterLargeContents(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789"), 50001)
	for _, piece := range []int{1000, bufferSize - 1, bufferSize, len(body)} {
		var buf bytes.Buffer
		w := NewWriter(&buf)
		if err := w.File("", false, int64(len(body))); err != nil {
			t.Fatal(err)
		}
		for rest := body; len(rest) > 0; {
			n, err := w.Write(rest[:min(piece, len(rest))])
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		x, size, err := ReadIndex(bytes.NewReader(buf.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		if size != w.Size() || nodes(x, buf.Bytes())[0].Contents != string(body) {
			t.Errorf("pieces of %d: contents differ", piece)
		}
	}
}

// failing fails every write.
type failing struct{}

var errFull = errors.New("full")

func (failing) Write([]byte) (int, error) { return 0, errFull }

func TestWriterError(t *testing.T) {
	w := NewWriter(failing{})
	if err := w.File("", false, bufferSize); err != nil {
		t.Fatal(err)
	}
	if n, err := w.Write(make([]byte, bufferSize)); n != 0 || !errors.Is(err, errFull) {
		t.Errorf("Write = %d, %v", n, err)
	}
	if err := w.Close(); !errors.Is(err, errFull) {
		t.Errorf("Close = %v", err)
	}
}

func BenchmarkWriteSmallFiles(b *testing.B) {
	const files = 50000
	archive := manyFiles(b, files)
	x, _, err := ReadIndex(bytes.NewReader(archive))
	if err != nil {
		b.Fatal(err)
	}
	tree := nodes(x, archive)
	b.ReportAllocs()
	for b.Loop() {
		if err := write(NewWriter(io.Discard), tree); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/files, "ns/file")
}
