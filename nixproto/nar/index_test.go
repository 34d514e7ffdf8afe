package nar

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// checkIndex wants x to come back from its encoding.
func checkIndex(t *testing.T, x Index, size int64) []byte {
	t.Helper()
	if got := x.NARSize(); got != size {
		t.Errorf("NARSize = %d, want %d", got, size)
	}
	b, err := x.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeIndex(b)
	if err != nil {
		t.Fatalf("decode %q: %v", b, err)
	}
	if d := cmp.Diff(x, got); d != "" {
		t.Error(d)
	}
	return b
}

func TestIndexEncoding(t *testing.T) {
	for _, tt := range narTests {
		t.Run(tt.name, func(t *testing.T) {
			archive := golden(t, tt.name)
			x, size, err := ReadIndex(bytes.NewReader(archive))
			if err != nil {
				t.Fatal(err)
			}
			b := checkIndex(t, x, size)
			for n := range b {
				if _, err := DecodeIndex(b[:n]); !errors.Is(err, ErrMalformed) {
					t.Errorf("first %d bytes: %v", n, err)
				}
			}
			if _, err := DecodeIndex(append(b, 0)); !errors.Is(err, ErrMalformed) {
				t.Errorf("a byte more: %v", err)
			}
		})
	}
}

func TestDecodeIndexMalformed(t *testing.T) {
	const dir, file, link = "\x01", "\x02", "\x03"
	for name, s := range map[string]string{
		"empty":                 "",
		"version":               "\x02\x01" + dir,
		"no entries":            "\x01\x00",
		"too many entries":      "\x01\xff\xff\xff\xff\x0f" + dir,
		"unknown kind":          "\x01\x01\x00",
		"executable directory":  "\x01\x01\x05",
		"executable link":       "\x01\x01\x07\x01x",
		"no directory":          "\x01\x02" + file + "\x00" + file + "\x01a\x00",
		"two roots":             "\x01\x02" + dir + "\x09\x01a\x00",
		"directory ends before": "\x01\x01\x09",
		"many ends":             "\x01\x02" + dir + "\xf9\x00\x01a",
		"endless ends":          "\x01\x02" + dir + "\xf9\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x01a",
		"empty name":            "\x01\x02" + dir + file + "\x00\x00",
		"name ..":               "\x01\x02" + dir + file + "\x02..\x00",
		"name with slash":       "\x01\x02" + dir + file + "\x02/x\x00",
		"same name":             "\x01\x03" + dir + file + "\x01a\x00" + file + "\x01a\x00",
		"order":                 "\x01\x03" + dir + file + "\x01b\x00" + file + "\x01a\x00",
		"empty target":          "\x01\x01" + link + "\x00",
		"target with NUL":       "\x01\x01" + link + "\x01\x00",
		"huge file":             "\x01\x01" + file + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"number not shortest":   "\x01\x01" + file + "\x80\x00",
		"number too long":       "\x01\x01" + file + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
		"huge files": "\x01\x04" + dir +
			file + "\x01a\x80\x80\x80\x80\x80\x80\x80\x80\x40" +
			file + "\x01b\x80\x80\x80\x80\x80\x80\x80\x80\x40" +
			file + "\x01c\x80\x80\x80\x80\x80\x80\x80\x80\x40",
	} {
		if x, err := DecodeIndex([]byte(s)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, %v", name, x, err)
		}
	}
}

func TestIndexTooDeep(t *testing.T) {
	b := []byte{indexVersion, MaxDepth + 2, byte(Directory)}
	for range MaxDepth + 1 {
		b = append(b, byte(Directory), 1, 'd')
	}
	if _, err := DecodeIndex(b); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
	b = b[:len(b)-3]
	b[1]--
	if _, err := DecodeIndex(b); err != nil {
		t.Error(err)
	}
}

func TestIndexSize(t *testing.T) {
	x, _, err := ReadIndex(bytes.NewReader(manyFiles(t, 1000)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := x.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	if perFile := len(b) / len(x); perFile > 30 {
		t.Errorf("%d bytes a file", perFile)
	}
}

// FuzzDecodeIndex wants of every index that is taken: it encodes to the same
// bytes, and an archive can be written that has it as its index.
func FuzzDecodeIndex(f *testing.F) {
	for _, tt := range narTests {
		x, _, err := ReadIndex(bytes.NewReader(golden(f, tt.name)))
		if err != nil {
			f.Fatal(err)
		}
		b, err := x.AppendBinary(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := DecodeIndex(b)
		if err != nil {
			return
		}
		again, err := x.AppendBinary(nil)
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q became %q, %v", b, again, err)
		}
		size := x.NARSize()
		if size > 1<<20 {
			return
		}
		var buf bytes.Buffer
		if err := write(NewWriter(&buf), nodes(x, make([]byte, size))); err != nil {
			t.Fatal(err)
		}
		got, n, err := ReadIndex(&buf)
		if err != nil || n != size {
			t.Fatalf("%d bytes of %d, %v", n, size, err)
		}
		if d := cmp.Diff(x, got); d != "" {
			t.Error(d)
		}
	})
}

func BenchmarkDecodeIndex(b *testing.B) {
	const files = 50000
	x, _, err := ReadIndex(bytes.NewReader(manyFiles(b, files)))
	if err != nil {
		b.Fatal(err)
	}
	enc, err := x.AppendBinary(nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeIndex(enc); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/files, "ns/file")
	b.ReportMetric(float64(len(enc))/files, "B/file")
}
