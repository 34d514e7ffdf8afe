// Package upstream reads binary caches: what other servers have built, or a
// folder that holds the same files.
//
//	Client ── Cache (a Source with a credential)
//	   │         ├── Info      nix-cache-info: StoreDir, priority; is it alive?
//	   │         ├── NarInfo   what it says of one path
//	   │         └── Open      the NAR, decompressed
//	   ├── memory      answers for a while, bounded; keyed by URL, credential and rule
//	   ├── transports  http.go: redirects, retries, timeouts; body.go: stalls
//	   └── rule        which addresses are reached for the account (package egress)
//
// Nothing that a cache says is believed here but that it has no such path:
// signatures and hashes are the caller's to check. What is bounded here is what
// a hostile cache costs: bytes of a document, of a compressed file and of a
// NAR, memory of a decoder, time without progress, redirects.
//
// A cache that does not answer is left out for a while (Config.DeadFor), so
// that it delays one request, by seconds, and no other.
//
// What an account names (an address, a redirect, the URL in a narinfo) is
// reached by the rule for accounts. What the operator named is reached wherever
// it is and leads.
package upstream

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"nbd/nixproto"
)

var (
	// ErrNotFound says that a cache does not have a path.
	ErrNotFound = errors.New("not in the cache")
	// ErrUnavailable says that a cache does not answer, or did not a short
	// while ago, or cannot be used.
	ErrUnavailable = errors.New("unavailable")
	// ErrMalformed says that a cache sent what is not as it should be.
	ErrMalformed = errors.New("cache sent malformed data")
)

// Config says how a Client works. The zero value works.
type Config struct {
	// UserAgent is what caches are told; default "nbd".
	UserAgent string
	// DeadFor is how long a cache that did not answer is left out; default one
	// minute.
	DeadFor time.Duration
	// AbsentFor is how long it is remembered that a cache does not have a path;
	// default one minute.
	AbsentFor time.Duration
	// KnownFor is how long what a cache said is remembered; default ten
	// minutes.
	KnownFor time.Duration
	// Logger takes what an operator may want to know; default: discarded.
	Logger *slog.Logger

	now  func() time.Time                     // default time.Now
	wait func(context.Context, time.Duration) // default a timer
	t    timing
}

// timing are the limits of one request. Zero fields get defaults.
type timing struct {
	connect  time.Duration // with name resolution
	headers  time.Duration // from request to the first byte of the answer
	document time.Duration // for a whole small document
	stall    time.Duration // within which minProgress bytes of a body have to come
}

func (c *Config) fill() {
	if c.UserAgent == "" {
		c.UserAgent = "nbd"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.wait == nil {
		c.wait = wait
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.DeadFor, time.Minute}, {&c.AbsentFor, time.Minute}, {&c.KnownFor, 10 * time.Minute},
		{&c.t.connect, 5 * time.Second}, {&c.t.headers, 10 * time.Second},
		{&c.t.document, 20 * time.Second}, {&c.t.stall, 20 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
}

// wait returns after d, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// A Client reads binary caches. Its methods, and those of its Caches, are safe
// for concurrent use.
type Client struct {
	cfg      Config
	operator *http.Transport // for what the operator names
	memory   *memory

	ctx    context.Context // of probes; ends in Close
	cancel context.CancelFunc
	work   sync.WaitGroup // probes

	mu      sync.Mutex // guards what follows
	probes  map[cacheKey]*probe
	guarded map[string]*http.Transport // for what accounts name, by the rule's id
}

// New returns a Client, to be ended with Close.
func New(cfg Config) *Client {
	cfg.fill()
	c := &Client{cfg: cfg, memory: newMemory(maxMemory, cfg.now), probes: make(map[cacheKey]*probe)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.guarded = make(map[string]*http.Transport)
	c.operator = newTransport(cfg.t, nil)
	return c
}

// Close ends what the Client began by itself. Requests of others end with their
// contexts.
func (c *Client) Close() {
	c.cancel()
	c.work.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetTransportsLocked()
	c.operator.CloseIdleConnections()
}

// maxTransports bounds the rules whose connections are kept. Rules are the
// operator's, so there are few.
const maxTransports = 64

// transport returns what connects to a source.
func (c *Client) transport(src Source) *http.Transport {
	if src.Operator {
		return c.operator
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.guarded[src.Rule.ID()]
	if t == nil {
		if len(c.guarded) == maxTransports {
			c.forgetTransportsLocked()
		}
		t = newTransport(c.cfg.t, src.Rule.Dialer)
		c.guarded[src.Rule.ID()] = t
	}
	return t
}

// forgetTransportsLocked forgets the transports of all rules. What is under way
// goes on.
func (c *Client) forgetTransportsLocked() {
	for id, t := range c.guarded {
		t.CloseIdleConnections()
		delete(c.guarded, id)
	}
}

// A Cache is one binary cache as one credential sees it.
type Cache struct {
	c   *Client
	src Source
	key cacheKey
	get getter
}

// A getter opens what lies at a reference, which is relative to the cache or an
// absolute URL. ErrNotFound if there is nothing.
type getter interface {
	get(ctx context.Context, ref string) (*body, error)
}

// Cache returns the cache that a source names, with the credential that is in
// its URL or else that of tokens. It asks the cache nothing.
func (c *Client) Cache(src Source, tokens Tokens) *Cache {
	auth := src.auth
	if auth == "" {
		auth = tokens.authorization(src.url)
	}
	k := &Cache{c: c, src: src, key: keyOf(src, auth)}
	if src.url.Scheme == "file" {
		k.get = folder(src.url.Path)
	} else {
		k.get = &site{c: c, base: src.url, auth: auth, transport: c.transport(src)}
	}
	return k
}

// String returns the URL of the cache, without any credential.
func (k *Cache) String() string { return k.src.String() }

// ID tells caches apart by URL, credential and rule: who has two Caches of one ID
// gets the same answers from both. It does not tell the credential.
func (k *Cache) ID() [32]byte { return k.key }

// maxDocument bounds nix-cache-info and narinfo texts, in bytes; a little more
// than their parsers take.
const maxDocument = 4<<20 + 1

// document reads a whole small document. One that breaks off is asked for again,
// once.
func (k *Cache) document(ctx context.Context, ref string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, k.c.cfg.t.document)
	defer cancel()
	text, err := k.documentOnce(ctx, ref)
	if errors.Is(err, io.ErrUnexpectedEOF) && ctx.Err() == nil {
		text, err = k.documentOnce(ctx, ref)
	}
	return text, err
}

func (k *Cache) documentOnce(ctx context.Context, ref string) ([]byte, error) {
	b, err := k.get.get(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return b.all(maxDocument)
}

// NarInfo returns what the cache says of a path; it is not verified in any way,
// but for being about that path. ErrNotFound if the cache does not have it.
// ErrUnavailable if the cache does not answer. The result is shared: it is not
// to be changed.
func (k *Cache) NarInfo(ctx context.Context, p nixproto.StorePath) (*nixproto.NarInfo, error) {
	if _, err := k.Info(ctx); err != nil {
		return nil, err
	}
	key := memoryKey{k.key, string(p)}
	if m, ok := k.c.memory.get(key); ok {
		return m.info, m.err
	}
	text, err := k.document(ctx, p.HashPart()+".narinfo")
	var n *nixproto.NarInfo
	if err == nil {
		n, err = parseNarInfo(p, text)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	switch {
	case err == nil:
		k.c.memory.put(key, remembered{info: n}, len(text), k.c.cfg.KnownFor)
	case errors.Is(err, errUnreachable):
		return nil, k.dead(err)
	default:
		err = k.fault(err)
		k.c.memory.put(key, remembered{err: err}, 0, k.c.cfg.AbsentFor)
	}
	return n, err
}

func parseNarInfo(p nixproto.StorePath, text []byte) (*nixproto.NarInfo, error) {
	n, err := nixproto.ParseNarInfo(text)
	if err != nil {
		return nil, errors.Join(ErrMalformed, err)
	}
	if n.Path != p {
		return nil, errors.Join(ErrMalformed, errors.New("narinfo of "+string(n.Path)+" in place of "+string(p)))
	}
	return n, nil
}
