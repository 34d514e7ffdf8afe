package server

import (
	"io"
	"sync"
	"time"

	"nbd/nixproto"
)

const (
	// flushAfter is how long a log message may wait for company, so that a
	// chatty build does not cost a packet a line.
	flushAfter = 50 * time.Millisecond
	// flushAt is how many bytes of messages are collected before they are
	// written; less than the Writer's buffer, so that it never writes half a
	// message and keeps the rest.
	flushAt = 24 << 10
)

// An outbox is the writing side of a worker session. The operation's messages
// may come from several goroutines; each is written whole. Methods block while
// the client does not read. A broken connection is not reported: the reading
// side learns of it.
type outbox struct {
	mu      sync.Mutex // guards what follows
	w       *nixproto.Writer
	v       nixproto.Version
	pending int         // bytes written since the last flush, about
	timer   *time.Timer // flushes; nil until it was first needed
}

func newOutbox(w io.Writer) *outbox {
	return &outbox{w: nixproto.NewWriter(w)}
}

// message writes one log message of about size bytes; it reaches the client
// soon.
func (o *outbox) message(m nixproto.LogMessage, size int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.pending > 0 && o.pending+size > flushAt {
		o.flushLocked()
	}
	_ = nixproto.WriteLog(o.w, o.v, m)
	o.pending += size
	switch {
	case o.pending > flushAt:
		o.flushLocked()
	case o.timer == nil:
		o.timer = time.AfterFunc(flushAfter, o.flush)
	case o.pending == size: // the first one since the last flush
		o.timer.Reset(flushAfter)
	}
}

// last ends an operation that succeeded with its answer, nil if there is none.
func (o *outbox) last(resp nixproto.Response) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = nixproto.WriteLog(o.w, o.v, &nixproto.LogLast{})
	_ = nixproto.WriteResponse(o.w, o.v, resp)
	o.flushLocked()
}

// fail ends an operation that failed.
func (o *outbox) fail(text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = nixproto.WriteError(o.w, o.v, &nixproto.LogError{Message: text})
	o.flushLocked()
}

// stream ends an operation that succeeded with raw bytes, which f writes.
func (o *outbox) stream(f func(w io.Writer) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = nixproto.WriteLog(o.w, o.v, &nixproto.LogLast{})
	if err := f(o.w); err != nil {
		return err
	}
	o.pending = 0
	return o.w.Flush()
}

func (o *outbox) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flushLocked()
}

func (o *outbox) flushLocked() {
	if o.timer != nil {
		o.timer.Stop()
	}
	_ = o.w.Flush() // sticky, see above
	o.pending = 0
}
