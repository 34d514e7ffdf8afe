package server

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"

	"nbd/store"
)

// maxAuthTries is how many keys a client may offer: an agent often holds more
// than the usual six.
const maxAuthTries = 20

// keyAlgorithms are the signatures by which clients may prove who they are: all
// that OpenSSH makes but those with SHA-1.
var keyAlgorithms = []string{
	gossh.KeyAlgoED25519, gossh.KeyAlgoSKED25519, gossh.KeyAlgoSKECDSA256,
	gossh.KeyAlgoECDSA256, gossh.KeyAlgoECDSA384, gossh.KeyAlgoECDSA521,
	gossh.KeyAlgoRSASHA256, gossh.KeyAlgoRSASHA512,
}

// defaultCiphers returns the ciphers that suit this processor. A client picks
// by its own order, and stock OpenSSH puts ChaCha20 first, which costs three
// to four times as much here; with AES in hardware it is not offered.
func defaultCiphers() []string {
	if cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL {
		return []string{gossh.CipherAES128GCM, gossh.CipherAES256GCM}
	}
	return []string{gossh.CipherChaCha20Poly1305, gossh.CipherAES128GCM, gossh.CipherAES256GCM}
}

func checkCiphers(list []string) error {
	known := slices.Concat(gossh.SupportedAlgorithms().Ciphers, gossh.InsecureAlgorithms().Ciphers)
	for _, c := range list {
		if !slices.Contains(known, c) {
			return fmt.Errorf("config: cipher %q is not known; there are %v", c, gossh.SupportedAlgorithms().Ciphers)
		}
	}
	return nil
}

// sshServer returns the SSH server: handshake and authentication by
// gliderlabs/ssh, sessions by our own handler, nothing else. It has no
// listener of its own, so that limits hold before it sees a connection.
func (s *Server) sshServer() *ssh.Server {
	return &ssh.Server{
		Version:     "nbd_" + s.cfg.Version,
		HostSigners: []ssh.Signer{s.cfg.HostKey},
		// With no handler at all gliderlabs/ssh would let everybody in.
		PublicKeyHandler: s.auth.known,
		ConnCallback: func(ctx ssh.Context, nc net.Conn) net.Conn {
			c := nc.(*conn)
			c.ctx = ctx
			ctx.SetValue(connKey{}, c)
			return c
		},
		ServerConfigCallback: func(ctx ssh.Context) *gossh.ServerConfig {
			return &gossh.ServerConfig{
				Config:                  gossh.Config{Ciphers: s.cfg.Ciphers},
				MaxAuthTries:            maxAuthTries,
				PublicKeyAuthAlgorithms: keyAlgorithms,
				VerifiedPublicKeyCallback: func(_ gossh.ConnMetadata, key gossh.PublicKey, _ *gossh.Permissions, _ string) (*gossh.Permissions, error) {
					return s.auth.verified(key, ctx.Value(connKey{}).(*conn).is)
				},
				NoClientAuth: true,
				NoClientAuthCallback: func(m gossh.ConnMetadata) (*gossh.Permissions, error) {
					return &gossh.Permissions{}, s.auth.none(m.User())
				},
				AuthLogCallback: func(_ gossh.ConnMetadata, method string, err error) {
					if err == nil && method != "none" {
						ctx.Value(connKey{}).(*conn).authenticated()
					}
				},
			}
		},
		ConnectionFailedCallback: func(c net.Conn, err error) {
			s.log.Debug("handshake ended", "client", c.RemoteAddr(), "err", err)
		},
		ChannelHandlers: map[string]ssh.ChannelHandler{"session": s.handleSession},
		RequestHandlers: map[string]ssh.RequestHandler{},
	}
}

// accept takes connections from l until it fails for good.
func (s *Server) accept(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			if s.acceptAgain(err) {
				continue
			}
			return err
		}
		if !s.gate.enter(c.RemoteAddr()) {
			s.log.Warn("connection refused: too many are in their handshake", "client", c.RemoteAddr())
			closeQuietly(c)
			continue
		}
		s.start(c)
	}
}

// acceptAgain reports whether accepting may work later, as when file
// descriptors have run out, and waits a little then.
func (s *Server) acceptAgain(err error) bool {
	var ne net.Error
	if errors.Is(err, net.ErrClosed) || !errors.As(err, &ne) {
		return false
	}
	s.log.Error("cannot accept a connection", "err", err)
	select {
	case <-time.After(100 * time.Millisecond):
		return true
	case <-s.ctx.Done():
		return false
	}
}

// start serves one connection.
func (s *Server) start(nc net.Conn) {
	c := &conn{Conn: nc, server: s}
	c.heard.Store(time.Now().UnixNano())
	c.handshake = time.AfterFunc(s.cfg.HandshakeTimeout, func() {
		s.log.Info("connection closed: no authentication in time", "client", nc.RemoteAddr())
		c.abort()
	})
	s.mu.Lock()
	ok := s.state == serving
	if ok {
		s.conns[c] = struct{}{}
		s.work.Add(1)
	}
	s.mu.Unlock()
	if !ok {
		c.end()
		return
	}
	go func() {
		defer s.work.Done()
		s.ssh.HandleConn(c)
		c.end()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

// connKey is where a connection's context holds its *conn.
type connKey struct{}

// A conn is the transport of one connection, from before its handshake.
type conn struct {
	net.Conn
	server    *Server
	ctx       ssh.Context // ends with the connection; set before the handshake
	handshake *time.Timer
	heard     atomic.Int64 // Unix nanoseconds of the last byte from the client

	mu       sync.Mutex  // guards what follows
	left     bool        // the gate no longer counts it
	ended    bool        // nobody uses it any more
	ping     *time.Timer // from authentication on
	asking   bool        // a keep-alive waits for its answer
	sessions int         // open ones
	client   *Client     // who it is; nil before its signature or token was verified
	expiry   *time.Timer // of its token; nil if it does not expire
	excess   int         // the limit that its account's connections are past; 0 if they are not
}

// SetDeadline does nothing: gliderlabs/ssh would lift deadlines at each read
// and write, and ours are timers.
func (c *conn) SetDeadline(time.Time) error { return nil }

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// abort closes the connection under whoever uses it.
func (c *conn) abort() { closeQuietly(c.Conn) }

// end releases what the connection holds, once nobody uses it.
func (c *conn) end() {
	c.handshake.Stop()
	c.abort()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.ping != nil {
		c.ping.Stop()
	}
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.leaveGateLocked()
}

func (c *conn) leaveGateLocked() {
	if !c.left {
		c.left = true
		c.server.gate.leave(c.RemoteAddr())
	}
}

// authenticated ends the limits that hold before authentication, and begins to
// watch the client.
func (c *conn) authenticated() {
	c.handshake.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaveGateLocked()
	if c.ping == nil && !c.ended {
		c.ping = time.AfterFunc(c.server.cfg.KeepAlive, c.keepAlive)
	}
}

// is notes who the client is.
func (c *conn) is(client *Client) {
	c.mu.Lock()
	c.client = client
	c.mu.Unlock()
	most := c.server.book.account(client.Account.ID).MaxConnections
	excess := most > 0 && c.server.connections(client.Account.ID) > most
	c.mu.Lock()
	if excess {
		c.excess = most
	}
	c.mu.Unlock()
}

// maxTokenless is how many sessions a connection may have open while nobody knows
// whose it is. What a client sends to one is in memory until it is read.
const maxTokenless = 2

// isToken notes who the client is that brought a token. All sessions of a
// connection are of one client.
func (c *conn) isToken(client *Client) error {
	c.mu.Lock()
	known := c.client
	c.mu.Unlock()
	if known != nil {
		if known.Token != client.Token {
			return refusef("this connection is another token's already; open a connection for each")
		}
		return nil
	}
	c.is(client)
	if most := c.tooMany(); most > 0 {
		return tooManyConnections(client, most)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !client.Expires.IsZero() && !c.ended && c.expiry == nil {
		c.expiry = time.AfterFunc(time.Until(client.Expires), func() {
			c.server.log.Info("connection closed: its token has expired", "client", client.Account.Name, "token", client.TokenName)
			c.abort()
		})
	}
	return nil
}

// tooManyConnections refuses a connection of an account that has enough.
func tooManyConnections(client *Client, most int) error {
	return refusef("account %s has more than %d connections open (max-connections): close some of them", client.Account.Name, most)
}

// tooMany returns the limit that its account's connections were past when this
// one came; 0 if they were not.
func (c *conn) tooMany() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.excess
}

// connections returns how many connections an account has open.
func (s *Server) connections(a store.AccountID) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.mu.Lock()
		if c.client != nil && c.client.Account.ID == a {
			n++
		}
		c.mu.Unlock()
	}
	return n
}

// Disconnect closes the connections of the clients that gone names, such as
// those whose key or token was removed. Their sessions end, and nobody waits for their
// builds any more.
func (s *Server) Disconnect(gone func(*Client) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.mu.Lock()
		client := c.client
		c.mu.Unlock()
		if client != nil && gone(client) {
			s.log.Info("connection closed: its key or token was removed", "client", client.Account.Name, "by", client.who())
			c.abort()
		}
	}
}

// keepAlive runs once in every keep-alive interval: it asks a silent client
// whether it is still there, and closes the connection of one that has not been
// heard of for long.
func (c *conn) keepAlive() {
	interval := c.server.cfg.KeepAlive
	silent := time.Since(time.Unix(0, c.heard.Load()))
	if silent > deadAfter*interval {
		c.server.log.Info("connection closed: client is silent", "client", c.RemoteAddr(), "for", silent)
		c.abort()
		return
	}
	sc, ok := c.ctx.Value(ssh.ContextKeyConn).(*gossh.ServerConn)
	c.mu.Lock()
	ask := ok && silent >= interval/2 && !c.asking && !c.ended
	c.asking = c.asking || ask
	if !c.ended {
		c.ping.Reset(interval)
	}
	c.mu.Unlock()
	if !ask {
		return
	}
	// This waits for the answer or the connection's end; any answer, a refusal
	// too, is a sign of life.
	_, _, _ = sc.SendRequest("keepalive@openssh.com", true, nil)
	c.mu.Lock()
	c.asking = false
	c.mu.Unlock()
}

// openSession counts a session; it reports false if there are too many.
func (c *conn) openSession() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	most := c.server.cfg.MaxSessions
	if c.client == nil {
		most = min(most, maxTokenless)
	}
	if c.sessions >= most {
		return false
	}
	c.sessions++
	return true
}

func (c *conn) closeSession() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sessions--
}

// closeQuietly closes a connection of which nothing more is expected.
func closeQuietly(c net.Conn) { _ = c.Close() }
