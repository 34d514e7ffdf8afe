package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/server/upstream"
	"nbd/store"
	"nbd/vm/egress"
)

// A Substituter brings paths from binary caches into the views of accounts: the
// caches of a session's settings, in the order of their priority, as far as
// they are signed by a key that the account trusts or prove themselves by their
// content address.
//
//	survey   which caches offer the paths and what they refer to? (this file)
//	fetch    the bytes, references first, into the view (substitutefetch.go)
//
// What a cache says makes nothing valid: a path enters a view when its bytes
// have arrived and were hashed for that account. Nothing that a cache does or
// omits fails a request; it is as if the cache did not have the path, and the
// client is told why.
//
// A nil Substituter finds nothing. Its methods are safe for concurrent use.
type Substituter struct {
	store   *store.Store
	client  *upstream.Client
	log     *slog.Logger
	storage *storageMeter // the Server's, too: what is fetched counts like what is brought

	mu        sync.Mutex // guards what follows
	downloads map[downloadKey]*download
	turns     map[store.AccountID]*turns
	all       chan struct{} // has room for one token per download
}

// NewSubstituter returns a Substituter that keeps what it fetches in the store.
// It does not close client.
func NewSubstituter(s *store.Store, client *upstream.Client, log *slog.Logger) *Substituter {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Substituter{
		store: s, client: client, log: log,
		storage:   &storageMeter{sizes: s},
		downloads: make(map[downloadKey]*download),
		turns:     make(map[store.AccountID]*turns),
		all:       make(chan struct{}, maxDownloads),
	}
}

// Bounds of what one request and all together may ask of caches.
const (
	maxAtOnce          = 16       // narinfos of one request at once
	maxSurvey          = 64 << 10 // paths of one request, with what they refer to
	maxDownloads       = 12       // at once
	maxAccountDownload = 6        // of one account at once
)

// Ensure brings those of the paths that the session cannot use yet, with what
// they refer to, from its caches into its own view, and returns those that it
// can use then, in their order; it keeps them until the session ends. With
// never-substitute nothing is fetched. Progress is shown on log, which may be
// nil. An error is ctx's or one of the store: a path that no cache has is none.
func (u *Substituter) Ensure(ctx context.Context, s *Session, paths []nixproto.StorePath, log LogSink) ([]nixproto.StorePath, error) {
	s.Keep(paths...)
	if u == nil {
		return s.Sight.Valid(ctx, paths)
	}
	y, err := u.survey(ctx, s, paths, log)
	if err != nil || len(y.order) == 0 {
		return y.usable(paths), err
	}
	if err := u.fetch(ctx, y); err != nil {
		return nil, err
	}
	return s.Sight.Valid(ctx, paths)
}

// Substitutable is what Ensure would do.
type Substitutable struct {
	// Usable are those of the paths that the session can use already.
	Usable []nixproto.StorePath
	// Infos are what caches say of what would be fetched, with what the paths
	// refer to, each after what it refers to.
	Infos []*nixproto.NarInfo
}

// Offers reports whether a path would be fetched.
func (t *Substitutable) Offers(p nixproto.StorePath) bool {
	return slices.ContainsFunc(t.Infos, func(n *nixproto.NarInfo) bool { return n.Path == p })
}

// Query says what Ensure would do for the paths, and fetches nothing.
func (u *Substituter) Query(ctx context.Context, s *Session, paths []nixproto.StorePath) (*Substitutable, error) {
	if u == nil {
		valid, err := s.Sight.Valid(ctx, paths)
		return &Substitutable{Usable: valid}, err
	}
	y, err := u.survey(ctx, s, paths, nil)
	if err != nil {
		return nil, err
	}
	t := &Substitutable{Usable: y.usable(paths)}
	for _, o := range y.order {
		t.Infos = append(t.Infos, o.info)
	}
	return t, nil
}

// A survey is what is known of the paths of one request and of what they refer
// to.
type survey struct {
	s       *Session
	log     LogSink // nil: nobody is told
	caches  []*upstream.Cache
	keys    []nixproto.PublicKey
	offers  map[nixproto.StorePath]*offer // nil values: neither usable nor offered
	valid   map[nixproto.StorePath]bool   // usable already
	order   []*offer                      // to be fetched, each after what it refers to
	mu      sync.Mutex                    // guards noted
	noted   map[string]bool
	further bool // tell also that caches are not there
}

// An offer is a path that caches have.
type offer struct {
	path  nixproto.StorePath
	cache int // the index of the cache that info is from
	info  *nixproto.NarInfo
	// waits is how many paths it refers to are not there yet, users are the
	// offers that wait for it; for the order, then for fetching.
	waits int
	users []*offer
}

// survey finds out what would have to be fetched for the paths. A path is
// offered only with all that it refers to.
func (u *Substituter) survey(ctx context.Context, s *Session, paths []nixproto.StorePath, log LogSink) (*survey, error) {
	y := &survey{
		s: s, log: log, noted: make(map[string]bool),
		offers: make(map[nixproto.StorePath]*offer), valid: make(map[nixproto.StorePath]bool),
	}
	missing, err := y.missing(ctx, paths)
	if err != nil || len(missing) == 0 {
		return y, err
	}
	if err := u.openCaches(ctx, y); err != nil || len(y.caches) == 0 {
		return y, err
	}
	for front := missing; len(front) > 0; {
		found, err := u.lookUp(ctx, y, front)
		if err != nil {
			return y, err
		}
		var next []nixproto.StorePath
		for i, p := range front {
			if y.offers[p] = found[i]; found[i] != nil {
				next = append(next, found[i].info.References...)
			}
		}
		if front, err = y.missing(ctx, next); err != nil {
			return y, err
		}
		if len(y.offers)+len(front) > maxSurvey {
			y.note(fmt.Errorf("nothing is copied from caches: more than %d paths would be needed", maxSurvey))
			return y, nil
		}
	}
	y.arrange(missing)
	return y, nil
}

// missing returns those of the paths that are not known of yet and that the
// session cannot use.
func (y *survey) missing(ctx context.Context, paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	var unknown []nixproto.StorePath
	for _, p := range paths {
		if _, asked := y.offers[p]; !asked && !y.valid[p] {
			unknown = append(unknown, p)
		}
	}
	slices.Sort(unknown)
	unknown = slices.Compact(unknown)
	y.s.Keep(unknown...)
	valid, err := y.s.Sight.Valid(ctx, unknown)
	if err != nil {
		return nil, err
	}
	for _, p := range valid {
		y.valid[p] = true
	}
	return slices.DeleteFunc(unknown, func(p nixproto.StorePath) bool { return y.valid[p] }), nil
}

// usable returns those of the paths that were usable already.
func (y *survey) usable(paths []nixproto.StorePath) []nixproto.StorePath {
	var usable []nixproto.StorePath
	for _, p := range paths {
		if y.valid[p] {
			usable = append(usable, p)
		}
	}
	return usable
}

// openCaches finds the caches of the session's settings that answer, and the
// keys that count; none with never-substitute.
func (u *Substituter) openCaches(ctx context.Context, y *survey) error {
	e, err := y.s.currentSettings()
	if err != nil || e.NeverSubstitute {
		return err
	}
	system := y.s.systemSettings(&e)
	y.further = e.Origin("substituters").Level > settings.System
	own, all := y.tokens(&e, system)
	var caches []*upstream.Cache
	rule := ruleOf(e.AllowAddresses)
	for _, url := range e.Substituters {
		operator := slices.Contains(system.Substituters, url)
		src, err := upstream.ParseSource(url.Raw(), operator)
		if err != nil {
			y.note(err)
			continue
		}
		src.Rule = rule
		tokens := own
		if operator {
			tokens = all
		}
		caches = append(caches, u.client.Cache(src, tokens))
	}
	var faults []error
	y.keys = e.TrustedPublicKeys
	y.caches, faults = upstream.Order(ctx, caches)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, err := range faults {
		y.noteFault(err)
	}
	return nil
}

// systemSettings returns what the operator set: caches that he named may be
// anywhere.
func (s *Session) systemSettings(e *settings.Effective) *settings.Effective {
	var system settings.Effective
	if s.book != nil {
		system = s.book.systemSettings()
	} else if e.Origin("substituters").Level <= settings.System {
		system = *e
	}
	return &system
}

// tokens returns the account's own credentials, and those together with the
// operator's, which are for the caches that he named and no others: else an
// account could read with them what is not its own.
func (y *survey) tokens(e, system *settings.Effective) (own, all upstream.Tokens) {
	add := func(t *upstream.Tokens, a settings.AccessToken) {
		if err := t.Add(a.Host, a.Token.Reveal()); err != nil {
			y.note(err)
		}
	}
	for _, a := range system.AccessTokens {
		add(&all, a)
	}
	for _, a := range e.AccessTokens {
		if !slices.Contains(system.AccessTokens, a) {
			add(&own, a)
			add(&all, a)
		}
	}
	return own, all
}

// noteFault tells of a cache that cannot be used; not of one that the client did
// not name and that is just not there.
func (y *survey) noteFault(err error) {
	var refused *egress.RefusedError
	if y.further || !upstream.Unreachable(err) || errors.As(err, &refused) {
		y.note(err)
	}
}

// note tells the client, once.
func (y *survey) note(err error) {
	text := printable(err.Error())
	y.mu.Lock()
	told := y.noted[text]
	y.noted[text] = true
	y.mu.Unlock()
	if told {
		return
	}
	y.s.Log.Info("substituters", "note", text)
	if y.log != nil {
		y.log.Note(text)
	}
}

// lookUp asks the caches for paths, several at once. The results are in the
// order of the paths, nil for what no cache offers.
func (u *Substituter) lookUp(ctx context.Context, y *survey, paths []nixproto.StorePath) ([]*offer, error) {
	found := make([]*offer, len(paths))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(maxAtOnce, len(paths)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(paths)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				found[i] = y.offerOf(ctx, paths[i], 0)
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return found, nil
}

// offerOf asks the caches from the one with index first on for one path; nil if
// none offers it.
func (y *survey) offerOf(ctx context.Context, p nixproto.StorePath, first int) *offer {
	for i := first; i < len(y.caches) && ctx.Err() == nil; i++ {
		info, err := y.caches[i].NarInfo(ctx, p)
		if err == nil {
			err = acceptable(info, y.keys)
			if err != nil {
				err = fmt.Errorf("cache %s: %w", y.caches[i], err)
			}
		}
		switch {
		case err == nil:
			return &offer{path: p, cache: i, info: info}
		case errors.Is(err, upstream.ErrNotFound) || ctx.Err() != nil:
		default:
			y.noteFault(err)
		}
	}
	return nil
}

// acceptable reports why what a cache says of a path does not count: nobody that
// is trusted signed it, and it has no content address, or a wrong one.
func acceptable(n *nixproto.NarInfo, keys []nixproto.PublicKey) error {
	signers, err := n.CheckSignatures(keys)
	if err != nil {
		return err
	}
	if n.CA != "" {
		return nixproto.CheckCA(&n.PathInfo)
	}
	if len(signers) == 0 {
		return fmt.Errorf("%s lacks a signature by a key in trusted-public-keys", n.Path)
	}
	return nil
}

// arrange puts the offers that the roots need into an order in which each comes
// after what it refers to. Whatever refers to what is neither usable nor
// offered, or to itself by way of others, is left out.
func (y *survey) arrange(roots []nixproto.StorePath) {
	var ready []*offer
	for _, o := range y.offers {
		if o == nil {
			continue
		}
		for _, ref := range o.references() {
			if y.valid[ref] {
				continue
			}
			o.waits++
			if to := y.offers[ref]; to != nil {
				to.users = append(to.users, o)
			}
		}
		if o.waits == 0 {
			ready = append(ready, o)
		}
	}
	whole := make(map[nixproto.StorePath]bool)
	var order []*offer
	for len(ready) > 0 {
		o := ready[len(ready)-1]
		ready = ready[:len(ready)-1]
		order = append(order, o)
		whole[o.path] = true
		for _, user := range o.users {
			if user.waits--; user.waits == 0 {
				ready = append(ready, user)
			}
		}
	}
	needed := make(map[nixproto.StorePath]bool)
	for todo := slices.Clone(roots); len(todo) > 0; {
		p := todo[len(todo)-1]
		if todo = todo[:len(todo)-1]; whole[p] && !needed[p] {
			needed[p] = true
			todo = append(todo, y.offers[p].references()...)
		}
	}
	y.order = slices.DeleteFunc(order, func(o *offer) bool { return !needed[o.path] })
}

// references returns what the path refers to beside itself.
func (o *offer) references() []nixproto.StorePath {
	return slices.DeleteFunc(slices.Clone(o.info.References), func(r nixproto.StorePath) bool { return r == o.path })
}
