package server

import (
	"context"
	"errors"
	"io"
	"time"

	"nbd/nixproto"
)

// A session of the worker protocol (nix-daemon --stdio) is a handshake and then
// one operation after the other. For each: the request's fields, for some a
// framed stream; back go any number of messages, then the end of the operation,
// an answer or an error. The client sends nothing before it has that.

// abandonAfter is how long a session may take to end once its client has left,
// before its connection is closed under it.
const abandonAfter = 5 * time.Second

// A worker serves one session of the worker protocol.
type worker struct {
	*session
	in  requests
	r   *nixproto.Reader
	out *outbox
	v   nixproto.Version
	ids *activityIDs

	maxSilent time.Duration // from SetOptions
}

// serveWorker serves the worker protocol on a session's channel until the
// client leaves, and returns the exit status.
func serveWorker(ss *session) int {
	r := nixproto.NewReader(ss.ch)
	r.Count(ss.server.store.NewCharge(ss.Client.Account.ID))
	defer r.Forget()
	w := &worker{session: ss, in: requests{r: r}, r: r, out: newOutbox(ss.ch), ids: newActivityIDs()}
	if err := w.handshake(); err != nil {
		return endStatus(err)
	}
	for {
		if err := w.in.await(); err != nil {
			if err == io.EOF {
				return 0
			}
			w.Log.Debug("session broken", "err", err)
			return exitError
		}
		if !w.begin() {
			w.out.fail("the server is shutting down; try again later")
			return exitError
		}
		inStep := w.operation()
		r.Forget()
		if !w.finish() || !inStep {
			return exitError
		}
	}
}

// endStatus is the exit status of a session that ended before its first
// request: a client that said nothing at all did nothing wrong.
func endStatus(err error) int {
	if err == io.EOF {
		return 0
	}
	return exitError
}

// firstSelfHash is the worker version of Nix 2.15 to 2.18; those before it have
// Nix 2.14 and older.
const firstSelfHash nixproto.Version = 1<<8 | 35

// handshake agrees on a version. After an error, which the client was told, the
// session is over; it is io.EOF if the client has left.
func (w *worker) handshake() error {
	trust := nixproto.NotTrusted
	if w.Client.Can(StoreWrite) {
		trust = nixproto.Trusted
	}
	hello := nixproto.Hello{Version: nixproto.MaxWorker, Nix: "nbd " + w.server.cfg.Version, Trust: trust}
	_, v, err := nixproto.ServerHandshake(w.r, w.out.w, hello)
	w.v, w.out.v = v, v
	w.beforeSelfHash = v < firstSelfHash
	var tooOld *nixproto.VersionError
	switch {
	case err == nil:
		w.out.last(nil)
	case errors.As(err, &tooOld):
		w.Log.Info("client refused", "err", err)
		w.out.fail(tooOld.Error())
	case err == io.EOF:
		w.Log.Debug("client left before the handshake")
	default:
		w.Log.Info("no handshake", "err", err)
		w.complain(err.Error())
	}
	return err
}

// operation serves one operation. It reports false if the connection is out of
// step and has to be closed.
func (w *worker) operation() bool {
	req, err := nixproto.ReadRequest(w.r, w.v)
	var value *nixproto.ValueError
	if err != nil && !errors.As(err, &value) {
		w.fail("request", err)
		w.linger()
		return false
	}
	stream := payload(req, w.r)
	var resp nixproto.Response
	if err == nil {
		if q, ok := req.(*nixproto.NarFromPath); ok {
			return w.narFromPath(q)
		}
		resp, err = w.handle(req, stream)
	}
	if err == nil {
		w.out.last(resp)
		return true
	}
	if stream != nil && errors.Is(err, io.ErrUnexpectedEOF) && w.r.Err() == nil {
		err = incomplete(err)
	}
	// Told before the rest of the stream is read: it may be long, and clients
	// look for an error while they send.
	w.fail(req.Op().String(), err)
	if stream == nil {
		return w.ctx.Err() == nil
	}
	return stream.Drain() == nil
}

// lingerFor is how long a client that goes on writing has to see why its request
// is refused.
const lingerFor = time.Second

// linger reads on behind a request that cannot be read: clients write all of it
// before they look for an error, and an end of the session would hide that.
func (w *worker) linger() {
	done := make(chan struct{})
	w.server.work.Go(func() { // ends with the session's channel
		defer close(done)
		_, _ = io.Copy(io.Discard, w.ch) // the client may be gone
	})
	select {
	case <-done:
	case <-time.After(lingerFor):
	}
}

// incomplete makes the end of a stream in a connection that goes on a mistake
// of the client.
func incomplete(err error) error {
	var short *shortUpload
	if errors.As(err, &short) {
		return refusef("%v", short)
	}
	return refusef("the upload ended before it was complete")
}

// fail tells the client and the log why an operation failed.
func (w *worker) fail(what string, err error) {
	text, level := explain(w.Session, err)
	w.Log.Log(w.ctx, level, "operation failed", "op", what, "err", err)
	w.out.fail(text)
}

// payload returns the framed stream that follows a request, nil if none does.
func payload(req nixproto.Request, r *nixproto.Reader) *nixproto.FramedReader {
	switch req.(type) {
	case *nixproto.AddToStore, *nixproto.AddToStoreNar, *nixproto.AddMultipleToStore, *nixproto.AddBuildLog:
		return nixproto.NewFramedReader(r)
	}
	return nil
}

// A requests waits for a session's requests, and can watch for the client's
// leaving while one of them is worked on. It is used by one goroutine.
type requests struct {
	r     *nixproto.Reader
	ahead chan error // answers the last watch; nil if there was none since await
}

// await blocks until a request begins. It returns io.EOF if none comes.
func (in *requests) await() error {
	if in.ahead == nil {
		return in.r.Await()
	}
	err := <-in.ahead
	in.ahead = nil
	return err
}

// watch ends ctx with errGone if the client leaves before it calls done. Until
// await was called the Reader must not be used: a read that waits cannot be
// taken back. If the session still does not end, abandon is called.
func (in *requests) watch(ctx context.Context, abandon func()) (_ context.Context, done func()) {
	if in.ahead != nil {
		return ctx, func() {} // two operations without a request between them
	}
	ctx, cancel := context.WithCancelCause(ctx)
	ahead := make(chan error, 1)
	in.ahead = ahead
	go func() {
		err := in.r.Await()
		if err != nil && ctx.Err() == nil {
			cancel(errGone)
			time.AfterFunc(abandonAfter, abandon)
		}
		ahead <- err
	}()
	return ctx, func() { cancel(nil) }
}
