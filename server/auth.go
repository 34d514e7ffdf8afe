package server

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

// A Permission is what a key may do; it is spelled as operators spell it.
type Permission string

// The permissions. One on the store without one on builds makes a pure cache
// credential.
const (
	BuildRead    Permission = "build:read"
	BuildWrite   Permission = "build:write"
	StoreRead    Permission = "store:read"
	StoreWrite   Permission = "store:write"
	AccountRead  Permission = "account:read"
	AccountWrite Permission = "account:write"
)

// A Client is who is at the other end of a connection: one key of one account.
// It does not change.
type Client struct {
	Account     store.Account
	Fingerprint string   // of the key: "SHA256:…"
	Permissions []string // of the key
}

// Can reports whether the client's key has a permission.
func (c *Client) Can(p Permission) bool { return slices.Contains(c.Permissions, string(p)) }

// require returns an error that names the permission which is missing.
func (c *Client) require(p Permission) error {
	if c.Can(p) {
		return nil
	}
	return refusef("permission denied: key %s does not have %s", c.Fingerprint, p)
}

// accounts knows who may come in; *store.Store. AccountByKey returns
// store.ErrNotFound for a key that nobody has.
type accounts interface {
	AccountByKey(ctx context.Context, wire []byte) (store.Account, store.Key, error)
}

// clientExtra is where a connection's permissions hold its *Client.
type clientExtra struct{}

// authenticator decides which keys open a connection. Any user name will do:
// the key alone tells who it is.
type authenticator struct {
	unknown  damper
	accounts accounts
	log      *slog.Logger
}

// known reports whether a key that a client offers would be accepted; the
// client has not proved yet that it is its own.
func (a *authenticator) known(ctx ssh.Context, key ssh.PublicKey) bool {
	_, _, err := a.accounts.AccountByKey(ctx, key.Marshal())
	log := a.log.With("client", ctx.RemoteAddr(), "key", gossh.FingerprintSHA256(key), "user", clip(ctx.User()))
	switch {
	case errors.Is(err, store.ErrNotFound):
		if ok, dropped := a.unknown.pass(time.Now()); ok {
			log.Info("unknown key refused", "not_logged_before", dropped)
		}
	case err != nil:
		log.Error("cannot look up key", "err", err)
	}
	return err == nil
}

// verified names the client whose signature by key was just verified, and
// calls found with it. The permissions it returns are the connection's own:
// what was offered before, and not used, leaves no trace in them.
func (a *authenticator) verified(key gossh.PublicKey, found func(*Client)) (*gossh.Permissions, error) {
	ctx, wire := context.Background(), key.Marshal()
	account, k, err := a.accounts.AccountByKey(ctx, wire)
	if err != nil {
		return nil, err
	}
	c := &Client{Account: account, Fingerprint: k.Fingerprint, Permissions: k.Permissions}
	found(c)
	// Who removed the key closed the connections that found knew then.
	if _, _, err := a.accounts.AccountByKey(ctx, wire); err != nil {
		return nil, err
	}
	return &gossh.Permissions{ExtraData: map[any]any{clientExtra{}: c}}, nil
}

// clientOf returns whom a connection authenticated as, nil if nobody.
func clientOf(conn *gossh.ServerConn) *Client {
	if conn.Permissions == nil {
		return nil
	}
	c, _ := conn.Permissions.ExtraData[clientExtra{}].(*Client)
	return c
}
