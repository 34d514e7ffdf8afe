package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"sync"

	"nbd/nixproto"
	"nbd/server/upstream"
	"nbd/store"
)

// Downloads of one request go on side by side, each path after those that it
// refers to. A path that cannot be had takes along what refers to it, and
// nothing else.
//
// Two requests that want the same NAR from the same cache with the same
// credential, of one account or of two, download it once: the second waits and
// then reads, and hashes, what the first one stored. The credential makes it
// fair: each could have downloaded it.

// A downloadKey says what is downloaded.
type downloadKey struct {
	cache [32]byte
	nar   nixproto.Hash
	file  string
}

// A download is one that is under way.
type download struct {
	done chan struct{} // closed at its end
	ok   bool          // with done: it is stored
}

// maxTransfers is how often a NAR is asked for from one cache.
const maxTransfers = 3

// fetch fetches what the survey found, as far as it can be had. An error is
// ctx's.
func (u *Substituter) fetch(ctx context.Context, y *survey) error {
	f := &fetcher{u: u, y: y, ctx: ctx, ended: make(chan *offer)}
	for _, o := range y.order {
		o.waits, o.users = 0, nil
	}
	for _, o := range y.order {
		for _, ref := range o.references() {
			if to := y.offers[ref]; to != nil {
				o.waits++
				to.users = append(to.users, o)
			}
		}
	}
	for _, o := range y.order {
		if o.waits == 0 {
			f.ready = append(f.ready, o)
		}
	}
	f.run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// A fetcher fetches the paths of one survey. Its fields are those of the
// goroutine that runs it.
type fetcher struct {
	u     *Substituter
	y     *survey
	ctx   context.Context
	ready []*offer
	ended chan *offer // those that were tried; nil info: in vain
}

func (f *fetcher) run() {
	for running := 0; running > 0 || len(f.ready) > 0; {
		for len(f.ready) > 0 && running < maxAccountDownload && f.ctx.Err() == nil {
			o := f.ready[0]
			f.ready = f.ready[1:]
			running++
			go f.one(o)
		}
		if running == 0 {
			return // ctx has ended
		}
		o := <-f.ended
		running--
		if o.info == nil {
			continue // what refers to it waits for ever, and is not fetched
		}
		for _, user := range o.users {
			if user.waits--; user.waits == 0 {
				f.ready = append(f.ready, user)
			}
		}
	}
}

// one fetches one path from the first cache that has it as it should be.
func (f *fetcher) one(o *offer) {
	defer func() {
		if p := recover(); p != nil { // as in session.run
			f.y.s.Log.Error("panic", "path", o.path, "panic", p, "stack", string(debug.Stack()))
			o.info = nil
		}
		f.ended <- o
	}()
	refs := o.info.References
	for f.ctx.Err() == nil {
		err := f.u.bring(f.ctx, f.y, o)
		if err == nil {
			return
		}
		if f.ctx.Err() != nil {
			break
		}
		f.y.note(fmt.Errorf("cannot copy '%s' from '%s': %w", o.path, f.y.caches[o.cache], err))
		other := f.y.offerOf(f.ctx, o.path, o.cache+1)
		if other == nil || !slices.Equal(other.info.References, refs) || isLocalFault(err) {
			break
		}
		o.cache, o.info = other.cache, other.info
	}
	o.info = nil
}

// isLocalFault reports whether another cache would not do better.
func isLocalFault(err error) bool {
	return errors.Is(err, store.ErrNoSpace) || isRefusal(err)
}

// bring puts one path into the session's view.
func (u *Substituter) bring(ctx context.Context, y *survey, o *offer) error {
	release, err := u.turn(ctx, y.s.account())
	if err != nil {
		return err
	}
	defer release()
	if err := u.checkStorage(ctx, y.s, o.info.NarSize); err != nil {
		return err
	}
	cache := y.caches[o.cache]
	if y.log != nil {
		defer y.log.StartCopy(o.path, cache.String())()
	}
	key := downloadKey{cache.ID(), o.info.NarHash, o.info.URL}
	for {
		if valid, err := y.s.Sight.Valid(ctx, []nixproto.StorePath{o.path}); err != nil || len(valid) > 0 {
			return err
		}
		d, first := u.begin(key)
		if first {
			err := u.transfer(ctx, y.s, cache, o.info)
			u.end(key, d, err == nil)
			return err
		}
		select {
		case <-d.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if !d.ok {
			continue
		}
		if err := u.again(ctx, y.s, o.info); !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
}

// checkStorage is session.checkStorage for what is fetched.
func (u *Substituter) checkStorage(ctx context.Context, s *Session, n uint64) error {
	if s.book == nil {
		return nil
	}
	e := s.book.account(s.account())
	if e.MaxStorage <= 0 {
		return nil
	}
	ok, err := u.storage.add(ctx, s.account(), int64(min(n, 1<<62)), e.MaxStorage)
	if err == nil && !ok {
		err = refusef("account %s has not the room for it that its max-storage of %d bytes would allow", s.Client.Account.Name, e.MaxStorage)
	}
	return err
}

// begin joins the download of a key; first says that it is the caller's to make
// and to end.
func (u *Substituter) begin(key downloadKey) (d *download, first bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if d := u.downloads[key]; d != nil {
		return d, false
	}
	d = &download{done: make(chan struct{})}
	u.downloads[key] = d
	return d, true
}

func (u *Substituter) end(key downloadKey, d *download, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.downloads, key)
	d.ok = ok
	close(d.done)
}

// transfer downloads a path into the session's view; what breaks off is tried
// again.
func (u *Substituter) transfer(ctx context.Context, s *Session, cache *upstream.Cache, info *nixproto.NarInfo) error {
	for try := 1; ; try++ {
		err := u.transferOnce(ctx, s, cache, info)
		if err == nil || try == maxTransfers || ctx.Err() != nil || !upstream.Unreachable(err) {
			return err
		}
		s.Log.Info("download broke off", "path", info.Path, "cache", cache.String(), "try", try, "err", err)
		u.client.Backoff(ctx, try)
	}
}

func (u *Substituter) transferOnce(ctx context.Context, s *Session, cache *upstream.Cache, info *nixproto.NarInfo) error {
	nar, err := cache.Open(ctx, info)
	if err != nil {
		return err
	}
	defer nar.Close()
	return u.add(ctx, s, info, nar, nar.Finish)
}

// again puts a path whose NAR was just stored into the session's view, by
// reading that. store.ErrNotFound if it is gone.
func (u *Substituter) again(ctx context.Context, s *Session, info *nixproto.NarInfo) error {
	blob, err := u.store.OpenBlob(ctx, info.NarHash)
	if err != nil {
		return err
	}
	defer closeBlob(s, blob)
	return u.add(ctx, s, info, io.NewSectionReader(blob, 0, blob.Size()), func() error { return nil })
}

// add reads a NAR into the session's own view. complete is called before it
// becomes valid.
func (u *Substituter) add(ctx context.Context, s *Session, n *nixproto.NarInfo, nar io.Reader, complete func() error) error {
	up, err := s.Sight.NewUpload(ctx, store.UploadOptions{})
	if err != nil {
		return err
	}
	defer up.Abort()
	info := n.PathInfo
	info.Ultimate, info.Signatures = false, slices.Clone(n.Signatures)
	if err := up.Add(&info, nar); err != nil {
		return err
	}
	if err := complete(); err != nil {
		return err
	}
	return up.Commit()
}

// turns are the downloads of one account that may go on.
type turns struct {
	slots chan struct{}
	users int // that have one or wait; guarded by Substituter.mu
}

// turn waits until a download may begin: a few for each account, and a number
// for all together. The caller releases it.
func (u *Substituter) turn(ctx context.Context, a store.AccountID) (release func(), err error) {
	u.mu.Lock()
	t := u.turns[a]
	if t == nil {
		t = &turns{slots: make(chan struct{}, maxAccountDownload)}
		u.turns[a] = t
	}
	t.users++
	u.mu.Unlock()
	leave := func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(u.turns, a)
		}
	}
	taken := []chan struct{}{}
	release = sync.OnceFunc(func() {
		for _, c := range taken {
			<-c
		}
		leave()
	})
	for _, c := range []chan struct{}{t.slots, u.all} {
		select {
		case c <- struct{}{}:
			taken = append(taken, c)
		case <-ctx.Done():
			release()
			return nil, context.Cause(ctx)
		}
	}
	return release, nil
}
