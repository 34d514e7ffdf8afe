package nixproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
)

// framed returns payload in frames of the given size, and behind it the number 7.
func framed(t testing.TB, payload []byte, size int) []byte {
	t.Helper()
	return encoded(t, func(w *Writer) error {
		f := NewFramedWriter(w)
		for p := payload; len(p) > 0; p = p[min(size, len(p)):] {
			if _, err := f.Write(p[:min(size, len(p))]); err != nil {
				return err
			}
		}
		err := f.Close()
		w.Uint64(7)
		return err
	})
}

func TestFramed(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 9, 1000, 100_000, 1 << 20} {
		payload := bytes.Repeat([]byte("0123456789abcde"), n/15+1)[:n]
		for _, size := range []int{1 + n/1000, 8192, 1 << 30} {
			r := NewReader(bytes.NewReader(framed(t, payload, size)))
			f := NewFramedReader(r)
			got, err := io.ReadAll(f)
			if err != nil || !bytes.Equal(got, payload) {
				t.Errorf("%d bytes in frames of %d: %d bytes, %v", n, size, len(got), err)
			}
			if err := f.Finish(); err != nil {
				t.Errorf("Finish: %v", err)
			}
			if r.Uint64() != 7 || r.Await() != io.EOF {
				t.Errorf("%d bytes in frames of %d: not behind the stream", n, size)
			}
		}
	}
}

// TestFramedValues decodes values that lie across frames.
func TestFramedValues(t *testing.T) {
	payload := encoded(t, func(w *Writer) error { return WritePathInfo(w, &sampleInfo) })
	for size := 1; size < 50; size++ {
		f := NewFramedReader(NewReader(bytes.NewReader(framed(t, payload, size))))
		p, err := ReadPathInfo(&f.Reader)
		if err != nil || p.CA != sampleInfo.CA {
			t.Fatalf("frames of %d: %v", size, err)
		}
		if err := f.Finish(); err != nil {
			t.Fatalf("frames of %d: Finish: %v", size, err)
		}
	}
}

// TestFramedInStep: whatever is wrong with a payload, the connection goes on
// behind it.
func TestFramedInStep(t *testing.T) {
	info := encoded(t, func(w *Writer) error { return WritePathInfo(w, &sampleInfo) })
	tests := map[string]struct {
		payload []byte
		read    error
		finish  error
	}{
		"short":     {info[:len(info)-1], io.ErrUnexpectedEOF, io.ErrUnexpectedEOF},
		"empty":     {nil, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF},
		"trailing":  {append(info[:len(info):len(info)], "12345678"...), nil, ErrTrailing},
		"malformed": {append(bytes.Repeat([]byte{0xff}, 8), info...), ErrMalformed, ErrMalformed},
	}
	for name, test := range tests {
		for _, size := range []int{1, 10, 1 << 20} {
			r := NewReader(bytes.NewReader(framed(t, test.payload, size)))
			f := NewFramedReader(r)
			if _, err := ReadPathInfo(&f.Reader); !errors.Is(err, test.read) {
				t.Errorf("%s: read: %v", name, err)
			}
			if err := f.Finish(); !errors.Is(err, test.finish) {
				t.Errorf("%s: Finish: %v", name, err)
			}
			if r.Uint64() != 7 || r.Err() != nil {
				t.Errorf("%s: the connection is out of step: %v", name, r.Err())
			}
		}
	}
}

// TestFramedCut: a connection that ends inside the stream.
func TestFramedCut(t *testing.T) {
	b := framed(t, []byte("0123456789"), 4)
	for n := range len(b) - 8 {
		r := NewReader(bytes.NewReader(b[:n]))
		f := NewFramedReader(r)
		if err := f.Drain(); err != io.ErrUnexpectedEOF {
			t.Errorf("Drain of %d bytes: %v", n, err)
		}
		if err := f.Finish(); err != io.ErrUnexpectedEOF {
			t.Errorf("Finish of %d bytes: %v", n, err)
		}
		if r.Err() != io.ErrUnexpectedEOF {
			t.Errorf("connection of %d bytes: %v", n, r.Err())
		}
	}
	huge := binary.LittleEndian.AppendUint64(nil, 1<<63)
	f := NewFramedReader(NewReader(strings.NewReader(string(huge) + "rest")))
	if err := f.Drain(); err != io.ErrUnexpectedEOF {
		t.Errorf("a frame that lies: %v", err)
	}
}

// TestReady: slices stay valid as long as Ready is true, and it is true often
// enough for many frames to be taken at once.
func TestReady(t *testing.T) {
	payload := make([]byte, 300_000)
	for i := range payload {
		payload[i] = byte(i * 7 >> 3)
	}
	for _, size := range []int{1, 3, 8, 100, 5000, 25056} {
		r := NewReader(bytes.NewReader(framed(t, payload, size)))
		f := NewFramedReader(r)
		var got []byte
		var held [][]byte
		batches := 0
		for {
			if !f.Ready() {
				batches++
				got = append(got, bytes.Join(held, nil)...)
				held = held[:0]
			}
			p, err := f.Peek()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, p)
			f.Discard(len(p))
		}
		got = append(got, bytes.Join(held, nil)...)
		if !bytes.Equal(got, payload) {
			t.Errorf("frames of %d: slices changed while they were held", size)
		}
		if most := 3 + 9*len(payload)/largeBuffer; batches > most {
			t.Errorf("frames of %d: %d batches, at most %d expected", size, batches, most)
		}
	}
}

func BenchmarkFramed(b *testing.B) {
	data := framed(b, make([]byte, 64<<20), 25056)
	b.SetBytes(64 << 20)
	for b.Loop() {
		f := NewFramedReader(NewReader(bytes.NewReader(data)))
		if err := f.Drain(); err != nil {
			b.Fatal(err)
		}
	}
}
