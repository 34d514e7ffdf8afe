package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// minProgress is how much of a body has to arrive within timing.stall of
// waiting for it, in bytes.
const minProgress = 16 << 10

// errStalled ends a request whose body does not get on.
var errStalled = errors.New("it sends too slowly")

// A body is the content of an answer, of which one goroutine reads. Time counts
// while a Read waits for the network, not while nobody reads.
type body struct {
	r        io.Reader
	close    func() error
	encoding string // Content-Encoding; "" if none
	size     int64  // negative if unknown

	stop   context.CancelCauseFunc
	ctx    context.Context
	timer  *time.Timer
	stall  time.Duration
	waited time.Duration // since the last minProgress bytes
	got    int           // meanwhile
}

func newBody(resp *http.Response, stop context.CancelCauseFunc, stall time.Duration) *body {
	b := &body{
		r: resp.Body, close: resp.Body.Close, encoding: resp.Header.Get("Content-Encoding"), size: resp.ContentLength,
		stop: stop, ctx: resp.Request.Context(), stall: stall,
	}
	b.timer = time.AfterFunc(stall, func() { stop(errStalled) })
	b.timer.Stop()
	return b
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.timer == nil {
		return b.r.Read(p)
	}
	start := time.Now()
	b.timer.Reset(b.stall - b.waited)
	n, err := b.r.Read(p)
	b.timer.Stop()
	b.waited += time.Since(start)
	if b.got += n; b.got >= minProgress {
		b.got, b.waited = 0, 0
	}
	if b.waited >= b.stall {
		b.stop(errStalled)
	}
	if err != nil && err != io.EOF {
		if b.ctx.Err() != nil {
			err = context.Cause(b.ctx)
		}
		err = fmt.Errorf("%w: %w", errUnreachable, err)
	}
	return n, err
}

// Close ends the request.
func (b *body) Close() {
	_ = b.close() // it was only read
	if b.timer != nil {
		b.timer.Stop()
		b.stop(nil)
	}
}

// all returns the whole content, without its encoding, if it is not longer than
// limit.
func (b *body) all(limit int64) ([]byte, error) {
	r, err := decoder(encodings[b.encoding], io.LimitReader(b, limit), limit)
	if err != nil {
		return nil, err
	}
	defer r.close()
	text, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) >= limit {
		return nil, fmt.Errorf("%w: a document of more than %d bytes", ErrMalformed, limit-1)
	}
	return text, nil
}

// encodings are the Content-Encodings by the names that narinfos use.
var encodings = map[string]string{
	"": "none", "identity": "none", "gzip": "gzip", "x-gzip": "gzip", "br": "br", "zstd": "zstd", "xz": "xz", "bzip2": "bzip2",
}

// Unreachable reports whether an error means that no answer came, or not all of
// it: another try may do better.
func Unreachable(err error) bool { return errors.Is(err, errUnreachable) }
