mkdir $out; cd /build
id > $out/ids; id -u >> $out/ids; id -G >> $out/ids
pwd > $out/cwd
ls -lan / | awk 'NR > 1 { print $1, $3, $4, $9, $10, $11 }' | sort -k4 > $out/root
ls -lan /etc | awk 'NR > 1 { print $1, $3, $4, $9, $10, $11 }' > $out/etc
for f in /etc/passwd /etc/group /etc/hosts; do echo "== $f"; cat $f; done >> $out/etc
ls -lan /dev | awk '$1 != "total" { t = substr($1, 1, 1); if (t == "c" || t == "b") print $1, $3, $4, $5, $6, $11; else print $1, $3, $4, $9, $10, $11 }' | grep -v '10, 232' | sort -k6 > $out/dev
stat -c '%a %u %g %n' /dev/shm /dev/pts /dev/null /dev/tty /dev/ptmx /dev/full /dev/zero /dev/random /dev/urandom /dev/pts/ptmx > $out/stat
stat -c '%a %u %g %n' / /tmp /build /nix /nix/store /etc /bin /proc /dev /etc/passwd /etc/group /etc/hosts >> $out/stat
ls -lan /tmp | awk 'NR > 1 { print $1, $3, $4, $9 }' > $out/tmp
ls -lan /build | awk 'NR > 1 { print $1, $3, $4, $9 }' > $out/build
ulimit -c > $out/core
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Sig...:|Umask)' /proc/self/status | grep -v SigCgt > $out/status
ls -l /proc/self/fd | awk 'NR > 1 { print $9 }' > $out/fds
uname -n > $out/uname; cat /proc/sys/kernel/domainname >> $out/uname
cat /proc/self/personality > $out/personality
for l in exe cwd root fd/0; do readlink /proc/self/$l; done | sed 's/[^/]*-/H-/' > $out/links
umask > $out/umask
stat -c '%a %u %g' /nix/store > $out/nix-store; ls /nix/store | sed 's/^[^-]*-//' | sort >> $out/nix-store
sed 's/^[0-9]* [0-9]* [0-9:]* //' /proc/self/mountinfo | awk '{ print $2 }' | grep -v /dev/kvm | sed 's/[^/]*-/H-/' | sort > $out/mounts
for f in /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; do cat $f; done | awk '{ $2 = $2 + 0 ? "H" : $2; print }' > $out/maps
ls -a /sys > $out/sys 2>&1 || true
ip -o addr | awk '{ print $2, $3, $4 }' | sort > $out/addr
echo /bin/* > $out/bin
cat /proc/sys/kernel/hostname > $out/hostname
ps -o pid,comm | awk '$1 == 1' > $out/pid1
[ -t 1 ] && [ -t 2 ] && echo both > $out/terminal
readlink /proc/$$/fd/1 | sed 's/[0-9]*$//' >> $out/terminal
