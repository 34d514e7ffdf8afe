package server

import (
	"context"
	"log/slog"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/store"
)

// A Session is one exec command of a client, from its start to its end.
// Its fields do not change after it started, but for beforeSelfHash, which is
// set between operations only.
type Session struct {
	// ID names the session in logs and, where a fault is the server's own, in
	// what the client is told. It is unique while the server runs.
	ID string
	// Client is who asks: a key and the account it belongs to.
	Client *Client
	// Env are the service settings that the client sent for the session
	// (names that begin with NBD_ or NIXBUILDNET_), as it spelled them.
	Env map[string]string
	// Settings are those of all levels down to the session's environment, as
	// they were when it began; settingsFor has those of a build.
	Settings settings.Effective
	// Sight is what the account may use of its own store paths and of others',
	// fixed for the session.
	Sight *store.Sight
	// Log carries the attributes client and session.
	Log *slog.Logger

	// beforeSelfHash is set for a client older than Nix 2.17, which computes
	// the content address of what refers to itself in another way: by the
	// handshake of the worker protocol, by the options of a build in the serve
	// protocol (where Nix 2.12 to 2.16 cannot be told from newer ones).
	beforeSelfHash bool

	book        *settingsBook // nil: Settings do not change
	environment settings.Layer
	storage     *storageMeter // nil: max-storage is no bound

	proto  protocol
	leases leases
}

// leases keeps paths of one account from collection until it is released
// (*store.Lease). Its methods may be called concurrently.
type leases interface {
	Add(paths ...nixproto.StorePath)
	Shrink(ctx context.Context) error
	Release()
}

// Keep keeps paths in the session's view from being collected until the
// session ends: those it brought, those it was told are valid.
func (s *Session) Keep(paths ...nixproto.StorePath) { s.leases.Add(paths...) }
