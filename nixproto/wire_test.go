package nixproto

import (
	"bytes"
	"errors"
	"io"
	"math"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
)

// An account counts what the current message takes.
type account struct {
	most, now, peak int64
}

var errTooMuch = errors.New("too much")

func (a *account) Set(n int64) error {
	if n > a.most {
		return errTooMuch
	}
	a.now, a.peak = n, max(a.peak, n)
	return nil
}

// Long messages are counted while they are in memory, those of framed streams
// too, and refused when there is no room for them.
func TestReaderCounts(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	stream := encoded(t, func(w *Writer) error {
		w.Str(long)
		w.Str("short")
		f := NewWriter(NewFramedWriter(w))
		f.Str(long)
		f.Str(long)
		if err := f.Flush(); err != nil {
			return err
		}
		w.Uint64(0)
		w.Str(long)
		return w.Err()
	})
	a := &account{most: 3 << 19}
	r := NewReader(bytes.NewReader(stream))
	r.Count(a)
	if r.Str(MaxMessage); a.now != 1<<20 {
		t.Errorf("%d bytes counted", a.now)
	}
	if r.Str(MaxMessage); a.now != 0 {
		t.Errorf("%d bytes counted after another message", a.now)
	}
	f := NewFramedReader(r)
	f.Str(MaxMessage)
	if f.Str(MaxMessage); a.now != 1<<20 {
		t.Errorf("%d bytes counted in a framed stream", a.now)
	}
	if err := f.Finish(); err != nil || a.now != 0 {
		t.Errorf("%v, %d bytes counted behind the stream", err, a.now)
	}
	a.most = 1 << 19
	if r.Str(MaxMessage); !errors.Is(r.Err(), errTooMuch) || a.now != 0 {
		t.Errorf("%v, %d bytes counted", r.Err(), a.now)
	}
}

func TestPrimitives(t *testing.T) {
	for n := range 40 {
		s := strings.Repeat("x", n)
		roundTrip(t, s, func(w *Writer) error { w.Str(s); return w.Err() },
			func(r *Reader) (string, error) { return r.Str(40), r.Err() })
		roundTrip(t, []byte(s), func(w *Writer) error { w.Bytes([]byte(s)); return w.Err() },
			func(r *Reader) ([]byte, error) { return r.Bytes(40), r.Err() })
	}
	for _, n := range []uint64{0, 1, 255, 256, math.MaxUint64} {
		roundTrip(t, n, func(w *Writer) error { w.Uint64(n); return w.Err() },
			func(r *Reader) (uint64, error) { return r.Uint64(), r.Err() })
	}
	list := []string{"b", "", "a"}
	roundTrip(t, list, func(w *Writer) error { w.Strings(list); return w.Err() },
		func(r *Reader) ([]string, error) { return r.Strings(3, 1), r.Err() })
	m := map[string]string{"k": "", "": "v"}
	roundTrip(t, m, func(w *Writer) error { w.StringMap(m); return w.Err() },
		func(r *Reader) (map[string]string, error) { return r.StringMap(), r.Err() })
	roundTrip(t, pathA, func(w *Writer) error { w.Path(pathA); return w.Err() },
		func(r *Reader) (StorePath, error) { return r.StorePath(), r.Err() })
	roundTrip(t, "", func(w *Writer) error { w.Path(""); return w.Err() },
		func(r *Reader) (string, error) { return string(r.OptPath()), r.Err() })
	if !NewReader(strings.NewReader("\x00\x02\x00\x00\x00\x00\x00\x00")).Bool() {
		t.Error("a number but 0 is not true")
	}
}

// TestLongStrings crosses all buffers.
func TestLongStrings(t *testing.T) {
	for _, n := range []int{smallBuffer - 1, smallBuffer, writeBuffer - 8, writeBuffer + 1, largeBuffer + 1, 3<<20 + 5} {
		want := strings.Repeat("0123456789abcde", n/15+1)[:n]
		b := encoded(t, func(w *Writer) error {
			w.Uint64(1)
			w.Str(want)
			w.Bytes([]byte(want))
			w.Uint64(2)
			return w.Err()
		})
		r := NewReader(bytes.NewReader(b))
		if r.Uint64() != 1 || r.Str(n) != want || string(r.Bytes(n)) != want || r.Uint64() != 2 || r.Err() != nil {
			t.Errorf("%d bytes: not read as written: %v", n, r.Err())
		}
	}
}

// TestHostile reads lengths and counts that lie; they must end as malformed or
// cut off, without memory having been spent on them.
func TestHostile(t *testing.T) {
	long := encoded(t, func(w *Writer) error { w.Uint64(MaxMessage); return w.Err() })
	huge := encoded(t, func(w *Writer) error { w.Uint64(math.MaxUint64); return w.Err() })
	half := encoded(t, func(w *Writer) error { w.Uint64(1 << 63); return w.Err() })
	reads := map[string]func(*Reader){
		"Str":       func(r *Reader) { r.Str(MaxMessage) },
		"Bytes":     func(r *Reader) { r.Bytes(MaxMessage) },
		"Strings":   func(r *Reader) { r.Strings(math.MaxInt, MaxMessage) },
		"Paths":     func(r *Reader) { r.Paths() },
		"StringMap": func(r *Reader) { r.StringMap() },
		"StorePath": func(r *Reader) { r.StorePath() },
		"items":     func(r *Reader) { derivedPaths(codec{r: r}, new([]DerivedPath)) },
		"outputs":   func(r *Reader) { r.begin(); r.derivationOutputs() },
		"built":     func(r *Reader) { r.begin(); r.builtOutputs() },
		"pathMap":   func(r *Reader) { r.begin(); new(OutputMap).fields(codec{r: r}) },
	}
	for name, read := range reads {
		for _, b := range [][]byte{long, huge, half} {
			r := NewReader(bytes.NewReader(b))
			used := allocated(func() { read(r) })
			if !errors.Is(r.Err(), ErrMalformed) && r.Err() != io.ErrUnexpectedEOF {
				t.Errorf("%s of %x: %v", name, b, r.Err())
			}
			if used > 1<<18 {
				t.Errorf("%s of %x: %d bytes allocated", name, b, used)
			}
		}
	}
}

func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestBudget: many small items and few large ones meet the same bound, which
// holds for a message, not for a connection.
func TestBudget(t *testing.T) {
	item := strings.Repeat("x", 1<<20)
	b := encoded(t, func(w *Writer) error {
		w.Strings([]string{item, item})
		w.Uint64(MaxMessage >> 20)
		for range MaxMessage >> 20 {
			w.Str(item)
		}
		return w.Err()
	})
	r := NewReader(bytes.NewReader(b))
	if got := r.Strings(2, 1<<20); len(got) != 2 || r.Err() != nil {
		t.Fatalf("%d items: %v", len(got), r.Err())
	}
	if r.Strings(1<<20, 1<<20); !errors.Is(r.Err(), ErrMalformed) {
		t.Errorf("a list of %d MiB: %v", MaxMessage>>20, r.Err())
	}
}

func TestMalformed(t *testing.T) {
	tests := map[string]struct {
		bytes string
		read  func(*Reader)
	}{
		"padding":       {"\x01\x00\x00\x00\x00\x00\x00\x00a\x00\x00\x00\x00\x00\x00\x01", func(r *Reader) { r.Str(8) }},
		"padding early": {"\x01\x00\x00\x00\x00\x00\x00\x00ab\x00\x00\x00\x00\x00\x00", func(r *Reader) { r.Str(8) }},
		"too long":      {"\x02\x00\x00\x00\x00\x00\x00\x00ab\x00\x00\x00\x00\x00\x00", func(r *Reader) { r.Str(1) }},
		"too many":      {"\x02\x00\x00\x00\x00\x00\x00\x00", func(r *Reader) { r.Strings(1, 1) }},
	}
	for name, test := range tests {
		r := NewReader(strings.NewReader(test.bytes))
		test.read(r)
		if !errors.Is(r.Err(), ErrMalformed) {
			t.Errorf("%s: %v", name, r.Err())
		}
		first := r.Err()
		if r.Uint64() != 0 || r.Str(9) != "" || r.Paths() != nil || r.Err() != first || r.Await() != first {
			t.Errorf("%s: the error does not stick", name)
		}
	}
}

func TestReaderErrors(t *testing.T) {
	broken := errors.New("broken")
	r := NewReader(iotest.ErrReader(broken))
	if err := r.Await(); err != broken {
		t.Errorf("Await: %v", err)
	}
	if _, err := ReadRequest(r, MaxWorker); err != broken {
		t.Errorf("ReadRequest: %v", err)
	}
	if r.Uint64(); !errors.Is(r.Err(), broken) {
		t.Errorf("Uint64: %v", r.Err())
	}
	if r := NewReader(stuck{}); !errors.Is(r.Await(), io.ErrNoProgress) {
		t.Error("a reader that returns nothing is not noticed")
	}
	// Bytes that come together with an error come first.
	r = NewReader(iotest.DataErrReader(strings.NewReader("\x07\x00\x00\x00\x00\x00\x00\x00")))
	if r.Uint64() != 7 || r.Err() != nil || r.Await() != io.EOF {
		t.Error("bytes that came with EOF are lost")
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

// TestLargeBuffer: much input gets a large buffer, and Await gives it back.
func TestLargeBuffer(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	r := NewReader(bytes.NewReader(data))
	b := r.src.(*buffer)
	var got []byte
	largest := 0
	for {
		p, err := r.Peek()
		if err == io.EOF {
			break
		}
		got = append(got, p...)
		largest = max(largest, len(p))
		r.Discard(len(p))
	}
	if !bytes.Equal(got, data) || largest != largeBuffer {
		t.Errorf("%d bytes of %d, largest piece %d", len(got), len(data), largest)
	}
	if b.large == nil {
		t.Error("no large buffer in use")
	}
	if err := r.Await(); err != io.EOF || b.large != nil {
		t.Errorf("Await: %v, large buffer kept: %v", err, b.large != nil)
	}
	// Unread bytes survive Await.
	r = NewReader(bytes.NewReader(data))
	for b = r.src.(*buffer); b.large == nil; {
		p, _ := r.Peek()
		r.Discard(len(p) - 1)
		_ = r.Await()
		_, _ = r.Read(make([]byte, 1))
		_, _ = r.Peek()
	}
	p, _ := r.Peek()
	first := p[0]
	if err := r.Await(); err != nil || b.large == nil {
		t.Fatalf("Await with unread bytes: %v", err)
	}
	if p, _ = r.Peek(); p[0] != first {
		t.Error("Await lost bytes")
	}
}

// TestIdleCost: what a connection holds between two requests.
func TestIdleCost(t *testing.T) {
	var keep []any
	const n = 100
	used := allocated(func() {
		for range n {
			r, w := NewReader(strings.NewReader("")), NewWriter(io.Discard)
			keep = append(keep, r, w)
		}
	})
	if per := used / n; per > smallBuffer+1024 {
		t.Errorf("%d bytes for a reader and a writer", per)
	}
	runtime.KeepAlive(keep)
}

func TestWriterErrors(t *testing.T) {
	broken := errors.New("broken")
	w := NewWriter(failing{broken})
	w.Str("x")
	if err := w.Err(); err != nil {
		t.Errorf("before Flush: %v", err)
	}
	if err := w.Flush(); err != broken || w.buf != nil {
		t.Errorf("Flush: %v, buffer kept: %v", err, w.buf != nil)
	}
	if _, err := w.Write(make([]byte, 1<<20)); err != broken {
		t.Errorf("Write: %v", err)
	}
	if w.Str(strings.Repeat("x", 1<<20)); w.Flush() != broken {
		t.Error("the error does not stick")
	}
	w = NewWriter(failing{nil})
	if w.Uint64(1); w.Flush() != io.ErrShortWrite {
		t.Errorf("a short write is %v", w.Err())
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// TestWriterDirect: what is larger than the buffer goes out in one piece and in
// order.
func TestWriterDirect(t *testing.T) {
	var calls []int
	w := NewWriter(writeFunc(func(p []byte) { calls = append(calls, len(p)) }))
	w.Uint64(1)
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	w.Uint64(2)
	if err := w.Flush(); err != nil || len(calls) != 3 || calls[0] != 8 || calls[1] != 1<<20 || calls[2] != 8 {
		t.Errorf("writes of %v bytes, %v", calls, err)
	}
}

type writeFunc func([]byte)

func (f writeFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

func BenchmarkReadRequest(b *testing.B) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	for range 1000 {
		if err := WriteRequest(w, MaxWorker, &QueryPathInfo{pathA}); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		r := NewReader(bytes.NewReader(buf.Bytes()))
		for range 1000 {
			if _, err := ReadRequest(r, MaxWorker); err != nil {
				b.Fatal(err)
			}
		}
	}
}
