package nixproto

import (
	"encoding/binary"
	"errors"
	"io"
)

// ErrTrailing says that a framed stream goes on behind what it should hold.
var ErrTrailing = errors.New("bytes behind the end of the uploaded data")

// A FramedReader reads the payload of a framed stream: frames of a length and
// that many bytes, without padding, up to a frame of length 0. Peek returns
// io.EOF there. Its decoding methods have an error of their own: a payload that
// is malformed leaves the connection in step once it is drained.
type FramedReader struct {
	Reader
	frames frames
}

// NewFramedReader returns a reader of the framed stream that begins at r. While
// it is in use, r must not be.
func NewFramedReader(r *Reader) *FramedReader {
	f := &FramedReader{frames: frames{r: r}}
	f.Reader.src = &f.frames
	f.Reader.account = r.account
	return f
}

// Finish reads the end of the stream, which has to come now. It drains the
// payload first, and then returns the connection's error, that of the payload's
// decoder, or ErrTrailing if there was payload left.
func (f *FramedReader) Finish() error {
	_, atEnd := f.frames.Peek()
	if err := f.Drain(); err != nil {
		return err
	}
	if f.err != nil {
		return f.err
	}
	if atEnd == nil {
		return ErrTrailing
	}
	return nil
}

// Drain discards the payload to its end, so that the connection stands behind
// the stream, whatever was wrong with the payload. Its error is the
// connection's.
func (f *FramedReader) Drain() error {
	f.Forget()
	for {
		b, err := f.frames.Peek()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		f.frames.Discard(len(b))
	}
}

// frames is the Source of a payload.
type frames struct {
	r    *Reader
	left uint64 // of the current frame
	done bool   // the frame of length 0 was read
}

func (f *frames) Peek() ([]byte, error) {
	if f.left == 0 && !f.done {
		f.left = f.r.u64()
		f.done = f.left == 0 && f.r.err == nil
	}
	if f.done {
		return nil, io.EOF
	}
	b := f.r.more()
	if b == nil {
		return nil, f.r.err
	}
	return b[:min(uint64(len(b)), f.left)], nil
}

func (f *frames) Discard(n int) {
	f.left -= uint64(n)
	f.r.Discard(n)
}

// Ready looks ahead to the next frame's header: that is read without the
// connection only if some of its frame is there too, or it is the last.
func (f *frames) Ready() bool {
	if f.done || f.r.err != nil {
		return true
	}
	if !f.r.src.Ready() {
		return false
	}
	if f.left > 0 {
		return true
	}
	b, err := f.r.src.Peek()
	if err != nil || len(b) > 8 {
		return true
	}
	return len(b) == 8 && binary.LittleEndian.Uint64(b) == 0
}

// A FramedWriter writes the payload of a framed stream, a frame for each Write.
type FramedWriter struct{ w *Writer }

// NewFramedWriter returns a writer of a framed stream to w.
func NewFramedWriter(w *Writer) *FramedWriter { return &FramedWriter{w} }

// Write writes p as one frame; nothing if p is empty.
func (f *FramedWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, f.w.Err()
	}
	f.w.Uint64(uint64(len(p)))
	return f.w.Write(p)
}

// Close writes the end of the stream and flushes.
func (f *FramedWriter) Close() error {
	f.w.Uint64(0)
	return f.w.Flush()
}
