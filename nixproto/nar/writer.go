package nar

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrMisuse is what the errors of a Writer about its caller wrap: an entry that
// an archive cannot have at this place, or contents of another size than said.
var ErrMisuse = errors.New("archive cannot be written")

// A Writer writes one archive. The root comes first, with the name ""; the
// entries of a directory follow it sorted bytewise by name, and EndDirectory
// ends it. The contents of a file are written after File, exactly as many bytes
// as it said. An error stays. It is used by one goroutine at a time.
type Writer struct {
	w    io.Writer
	buf  []byte
	err  error
	size int64 // bytes handed to w or in buf

	rest    int64 // contents that the open file lacks
	padding int64 // zeros after them
	file    bool  // a file is open
	done    bool  // the root has ended
	last    []string
}

// bufferSize is how much a Writer collects before it writes. Contents at least
// as long as that are written without a copy.
const bufferSize = 64 << 10

// NewWriter returns a Writer of an archive to w.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w, buf: make([]byte, 0, bufferSize)}
}

// Directory begins a directory.
func (w *Writer) Directory(name string) error {
	if err := w.begin(name); err != nil {
		return err
	}
	w.put(directory)
	w.last = append(w.last, "")
	return w.err
}

// EndDirectory ends the innermost directory.
func (w *Writer) EndDirectory() error {
	if err := w.endFile(); err != nil {
		return err
	}
	if len(w.last) == 0 {
		return w.misuse("no directory to end")
	}
	w.last = w.last[:len(w.last)-1]
	w.end()
	return w.err
}

// File begins a regular file with so many bytes of contents.
func (w *Writer) File(name string, exec bool, size int64) error {
	if err := w.begin(name); err != nil {
		return err
	}
	if size < 0 {
		return w.misuse("file %q has negative size", name)
	}
	w.put(regular)
	if exec {
		w.put(executable)
	}
	w.put(contents)
	w.putLen(size)
	w.file, w.rest, w.padding = true, size, pad(size)
	return w.err
}

// Write writes contents of the file that was begun last.
func (w *Writer) Write(b []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	if int64(len(b)) > w.rest {
		return 0, w.misuse("%d bytes more than the file's size", int64(len(b))-w.rest)
	}
	w.rest -= int64(len(b))
	w.size += int64(len(b))
	if len(b) >= bufferSize {
		w.flush()
		if w.err == nil {
			_, w.err = w.w.Write(b)
		}
	} else {
		w.buf = append(w.room(len(b)), b...)
	}
	if w.err != nil {
		return 0, w.err
	}
	return len(b), nil
}

// Symlink writes a symbolic link.
func (w *Writer) Symlink(name, to string) error {
	if err := w.begin(name); err != nil {
		return err
	}
	if err := checkTarget(to); err != nil {
		return w.misuse("%v", err)
	}
	w.put(symlink)
	w.put(target)
	w.putString(to)
	w.end()
	return w.err
}

// Close ends the archive and flushes it. It wants the root to be complete, and
// does not close the underlying writer.
func (w *Writer) Close() error {
	if err := w.endFile(); err != nil {
		return err
	}
	if !w.done {
		return w.misuse("no root, or %d directories not ended", len(w.last))
	}
	w.flush()
	return w.err
}

// Size returns how many bytes the archive has so far.
func (w *Writer) Size() int64 { return w.size }

// begin ends the file before and writes what precedes the kind of an entry.
func (w *Writer) begin(name string) error {
	if err := w.endFile(); err != nil {
		return err
	}
	if w.done {
		return w.misuse("entry %q after the end", name)
	}
	if len(w.last) == 0 {
		if name != "" {
			return w.misuse("name %q for the root", name)
		}
		w.put(magic)
		w.put(nodeOpen)
		return w.err
	}
	if err := checkName(name); err != nil {
		return w.misuse("%v", err)
	}
	if len(w.last) > MaxDepth {
		return w.misuse("entry %q is nested deeper than %d", name, MaxDepth)
	}
	last := &w.last[len(w.last)-1]
	if name <= *last {
		return w.misuse("name %q after %q", name, *last)
	}
	*last = name
	w.put(entry)
	w.put(entryName)
	w.putString(name)
	w.put(nameNode)
	return w.err
}

// endFile ends the open file, if there is one.
func (w *Writer) endFile() error {
	if w.err != nil || !w.file {
		return w.err
	}
	if w.rest > 0 {
		return w.misuse("file lacks %d bytes of its size", w.rest)
	}
	w.put(zeros[:w.padding])
	w.file = false
	w.end()
	return w.err
}

// end ends a node, and the entry that holds it.
func (w *Writer) end() {
	w.put(closing)
	if len(w.last) > 0 {
		w.put(closing)
	} else {
		w.done = true
	}
}

const zeros = "\x00\x00\x00\x00\x00\x00\x00"

func (w *Writer) put(s string) {
	w.size += int64(len(s))
	w.buf = append(w.room(len(s)), s...)
}

func (w *Writer) putLen(n int64) {
	w.size += 8
	w.buf = binary.LittleEndian.AppendUint64(w.room(8), uint64(n))
}

func (w *Writer) putString(s string) {
	w.putLen(int64(len(s)))
	w.put(s)
	w.put(zeros[:pad(int64(len(s)))])
}

// room returns the buffer with place for n more bytes.
func (w *Writer) room(n int) []byte {
	if len(w.buf)+n > bufferSize {
		w.flush()
	}
	return w.buf
}

func (w *Writer) flush() {
	if w.err == nil && len(w.buf) > 0 {
		_, w.err = w.w.Write(w.buf)
	}
	w.buf = w.buf[:0]
}

// misuse ends the writer.
func (w *Writer) misuse(format string, args ...any) error {
	w.err = fmt.Errorf("%w: %s", ErrMisuse, fmt.Sprintf(format, args...))
	return w.err
}
