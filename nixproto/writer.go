package nixproto

import (
	"encoding/binary"
	"io"
	"maps"
	"slices"
	"sync"
)

// writeBuffer is the largest packet of an SSH channel as OpenSSH makes it.
const writeBuffer = 32 << 10

var writeBuffers = sync.Pool{New: func() any { return new([writeBuffer]byte) }}

// A Writer encodes the wire. It holds a buffer only between the first byte and
// Flush, so an idle one costs nothing. Its error is sticky: after the first
// failure nothing is written. It is for one goroutine at a time.
type Writer struct {
	w   io.Writer
	buf *[writeBuffer]byte // nil while empty
	n   int                // bytes in buf
	err error
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Err returns the first failure.
func (w *Writer) Err() error { return w.err }

// Flush writes what is buffered and returns the first failure.
func (w *Writer) Flush() error {
	w.spill()
	if w.buf != nil {
		writeBuffers.Put(w.buf)
		w.buf = nil
	}
	return w.err
}

// Write implements io.Writer for raw bytes. What is larger than the buffer is
// passed on without being copied.
func (w *Writer) Write(p []byte) (int, error) {
	if w.n+len(p) > writeBuffer {
		w.spill()
	}
	if w.err != nil {
		return 0, w.err
	}
	if len(p) >= writeBuffer {
		return w.direct(p)
	}
	if w.buf == nil {
		w.buf = writeBuffers.Get().(*[writeBuffer]byte)
	}
	w.n += copy(w.buf[w.n:], p)
	return len(p), nil
}

// spill writes the buffer and keeps it.
func (w *Writer) spill() {
	if w.n > 0 && w.err == nil {
		_, _ = w.direct(w.buf[:w.n]) // the error is kept in w.err
	}
	w.n = 0
}

func (w *Writer) direct(p []byte) (int, error) {
	n, err := w.w.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	w.err = err
	return n, err
}

// Uint64 writes an integer.
func (w *Writer) Uint64(v uint64) {
	var raw [8]byte
	binary.LittleEndian.PutUint64(raw[:], v)
	_, _ = w.Write(raw[:]) // sticky, as all errors below
}

// Bool writes a boolean.
func (w *Writer) Bool(v bool) {
	if v {
		w.Uint64(1)
	} else {
		w.Uint64(0)
	}
}

// Str writes a string.
func (w *Writer) Str(s string) {
	w.Uint64(uint64(len(s)))
	if len(s) >= writeBuffer {
		_, _ = w.Write([]byte(s))
	} else {
		w.short(s)
	}
	w.pad(len(s))
}

// short is Write for a string shorter than the buffer, without a copy of it.
func (w *Writer) short(s string) {
	if w.n+len(s) > writeBuffer {
		w.spill()
	}
	if w.err != nil || s == "" {
		return
	}
	if w.buf == nil {
		w.buf = writeBuffers.Get().(*[writeBuffer]byte)
	}
	w.n += copy(w.buf[w.n:], s)
}

// Bytes writes a string.
func (w *Writer) Bytes(p []byte) {
	w.Uint64(uint64(len(p)))
	_, _ = w.Write(p)
	w.pad(len(p))
}

func (w *Writer) pad(n int) {
	var zeros [8]byte
	_, _ = w.Write(zeros[:-n&7])
}

// Strings writes a list of strings in their order. A set has to be sorted, as
// Nix does it.
func (w *Writer) Strings(list []string) {
	w.Uint64(uint64(len(list)))
	for _, s := range list {
		w.Str(s)
	}
}

// Path writes a store path, or an empty string for none.
func (w *Writer) Path(p StorePath) { w.Str(string(p)) }

// Paths writes store paths in their order. A set has to be sorted, as Nix does
// it.
func (w *Writer) Paths(list []StorePath) {
	w.Uint64(uint64(len(list)))
	for _, p := range list {
		w.Path(p)
	}
}

// StringMap writes a map, sorted by its keys.
func (w *Writer) StringMap(m map[string]string) {
	w.Uint64(uint64(len(m)))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		w.Str(k)
		w.Str(m[k])
	}
}
