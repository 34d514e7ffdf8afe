// Package server speaks to Nix clients over SSH and decides what happens.
//
// A client is a key, which belongs to an account of the store (auth.go). On
// its connection (ssh.go) it opens sessions, each of which runs one exec
// command: the worker protocol (conn.go, ops.go, transfer.go) or the serve
// protocol (serve.go). A Session is what the rest of the server knows of it.
//
//	listener ── limits ── handshake ── key → account     ssh.go, auth.go
//	   └── session channel ── env, exec                  channel.go, command.go
//	         ├── nix-daemon --stdio ── operation loop    conn.go, ops.go
//	         │     └── paths in and out                  transfer.go
//	         └── nix-store --serve  ── command loop      serve.go
//	               └── Builder: builds                   builder.go (interface)
//
// What holds throughout:
//
//   - Everything a client can ask about or change is its account's own view of
//     the store; "not there" and "not yours" are the same answer.
//   - What was reported valid or uploaded in a session is leased until the
//     session ends.
//   - A message to a client is written whole. Nothing that a client does or
//     omits delays another client or a build: what a session reads and writes
//     blocks that session alone.
//   - After an error a session either has read the whole failed request or is
//     closed.
//   - Every goroutine belongs to the Server and ends before Close returns.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// Config says how a Server treats clients. HostKey, Store and Builder are
// needed; of the rest the zero value works.
type Config struct {
	// HostKey is what clients know the server by; see LoadHostKey.
	HostKey gossh.Signer
	// Store is what clients see their views of.
	Store *store.Store
	// Builder builds for them. The Server does not close it.
	Builder Builder
	// Substituter fetches paths from caches; nil: nothing does.
	Substituter *Substituter
	// Control acts on builds for the shell and api; nil: builds are only looked
	// at. It is usually the Builder.
	Control BuildControl
	// Version is shown to clients behind "nbd "; default "devel".
	Version string
	// TrustedKeys are the operator's public keys of caches: a signature in the
	// name of one of them has to verify.
	TrustedKeys []nixproto.PublicKey
	// Settings are the system's by name, as text, under those that are stored
	// for it. See package settings.
	Settings map[string]string
	// TempDir is where large files are put while they arrive; default is the
	// system's.
	TempDir string
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger

	// Ciphers are the SSH ciphers offered. By default those that suit the
	// processor: only AES-GCM where it has instructions for that.
	Ciphers []string
	// MaxUnauthenticated is how many connections may be in their handshake at
	// once, and a quarter of them from one address; default 64.
	MaxUnauthenticated int
	// HandshakeTimeout bounds the time from a connection to its
	// authentication; default 20 s.
	HandshakeTimeout time.Duration
	// MaxConnections is the max-connections of Settings if these have none;
	// default 2048.
	MaxConnections int
	// MaxSessions is how many sessions one connection may have open at once;
	// default 64.
	MaxSessions int
	// KeepAlive is after how long a silent client is asked whether it is still
	// there; default 20 s. After three times that without a sign of life its
	// connection is closed.
	KeepAlive time.Duration
}

// deadAfter is how many keep-alive intervals a connection may be silent.
const deadAfter = 3

func (c *Config) fill() error {
	switch {
	case c.HostKey == nil:
		return errors.New("config: HostKey is missing")
	case c.Store == nil:
		return errors.New("config: Store is missing")
	case c.Builder == nil:
		return errors.New("config: Builder is missing")
	}
	if c.Version == "" {
		c.Version = "devel"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Ciphers == nil {
		c.Ciphers = defaultCiphers()
	}
	if c.MaxUnauthenticated == 0 {
		c.MaxUnauthenticated = 64
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = 20 * time.Second
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 2048
	}
	if _, ok := c.Settings["max-connections"]; !ok {
		c.Settings = maps.Clone(c.Settings)
		if c.Settings == nil {
			c.Settings = map[string]string{}
		}
		c.Settings["max-connections"] = strconv.Itoa(c.MaxConnections)
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = 64
	}
	if c.KeepAlive == 0 {
		c.KeepAlive = 20 * time.Second
	}
	return nil
}

// A Server serves SSH clients. Its methods are safe for concurrent use.
type Server struct {
	cfg   Config
	store *store.Store
	log   *slog.Logger
	auth  authenticator
	ssh   *ssh.Server
	gate  *gate
	book  *settingsBook
	// storage knows what accounts have, for max-storage.
	storage *storageMeter
	trusts  *trusts
	// proofs makes what is signed with keys that are to be added.
	proofs proofSecret

	ctx    context.Context // of everything that goes on; ends in Close
	cancel context.CancelFunc
	nextID atomic.Uint64 // of sessions

	vouchers vouchers

	mu        sync.Mutex // guards what follows
	state     state
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	sessions  map[*session]struct{}
	work      sync.WaitGroup // connections and sessions; Add only while not closed
	idle      chan struct{}  // closed when draining and no session is left; nil before
}

// The life of a Server: serving ─Drain─▶ draining ─Close─▶ closed.
type state uint8

const (
	serving  state = iota
	draining       // no new connection, session or request
	closed
)

// ErrClosed is what Serve returns after Drain or Close.
var ErrClosed = errors.New("server is closed")

// New returns a Server; Serve starts it.
func New(cfg Config) (*Server, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	if err := checkSystemSettings(cfg.Settings); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if err := checkCiphers(cfg.Ciphers); err != nil {
		return nil, err
	}
	s := &Server{
		cfg:       cfg,
		store:     cfg.Store,
		log:       cfg.Logger,
		auth:      authenticator{accounts: cfg.Store, log: cfg.Logger},
		book:      newSettingsBook(cfg.Settings, cfg.Store, cfg.Logger),
		storage:   &storageMeter{sizes: cfg.Store},
		gate:      newGate(cfg.MaxUnauthenticated),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
		sessions:  map[*session]struct{}{},
	}
	s.trusts = &trusts{book: s.book}
	if cfg.Substituter != nil {
		s.storage = cfg.Substituter.storage
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.ssh = s.sshServer()
	return s, nil
}

// Serve accepts connections from l until Drain or Close, which close l; then
// its error is ErrClosed. Several listeners may be served at once.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.state != serving {
		s.mu.Unlock()
		return errors.Join(ErrClosed, l.Close())
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	err := s.accept(l)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != serving {
		return ErrClosed
	}
	delete(s.listeners, l)
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}

// Drain takes no new connections, ends sessions that are between two requests,
// and returns when the others have finished theirs, or with ctx's error.
// Connections stay open until Close.
func (s *Server) Drain(ctx context.Context) error {
	s.mu.Lock()
	if s.state == serving {
		s.state = draining
	}
	if s.idle == nil {
		s.idle = make(chan struct{})
		s.checkIdleLocked()
	}
	idle := s.idle
	s.closeListenersLocked()
	for c := range s.sessions {
		c.endIfIdleLocked()
	}
	s.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends everything at once and returns when it has ended.
func (s *Server) Close() error {
	s.mu.Lock()
	s.state = closed
	s.closeListenersLocked()
	for c := range s.conns {
		c.abort()
	}
	s.mu.Unlock()
	s.cancel()
	s.work.Wait()
	return nil
}

func (s *Server) closeListenersLocked() {
	for l := range s.listeners {
		if err := l.Close(); err != nil {
			s.log.Warn("cannot close listener", "addr", l.Addr(), "err", err)
		}
		delete(s.listeners, l)
	}
}

// checkIdleLocked tells Drain when the last session is gone.
func (s *Server) checkIdleLocked() {
	if s.state != serving && s.idle != nil && len(s.sessions) == 0 {
		select {
		case <-s.idle:
		default:
			close(s.idle)
		}
	}
}

// newSessionID returns a short name for a session that occurs once in a log.
func (s *Server) newSessionID() string {
	return strconv.FormatUint(s.nextID.Add(1), 36)
}

// trustedKeys returns the keys whose signatures can be verified for a session:
// the operator's, those that the account trusts, its own.
func (ss *session) trustedKeys() []nixproto.PublicKey {
	keys := append(slices.Clip(ss.server.cfg.TrustedKeys), ss.Settings.TrustedPublicKeys...)
	if own, err := nixproto.ParsePublicKey(ss.Client.Account.PublicKey); err == nil {
		keys = append(keys, own)
	}
	return keys
}

// Sessions returns how many sessions are open.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}
